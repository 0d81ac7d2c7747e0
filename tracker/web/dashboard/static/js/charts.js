// Draws the charts from the page's data attributes, in the theme's colours.
// The page also shows each as a table, for people who cannot see it.
const figures = () => document.querySelectorAll("figure.chart[data-chart]");
const drawn = new Map();

// A custom property as a colour that a canvas understands.
function colour(name) {
  const probe = document.body.appendChild(document.createElement("span"));
  probe.style.color = `var(${name}, var(--line-strong))`; // a status of a newer FLORA has no colour
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// Stacked bars: each series is drawn up to the sum of those below it, the highest first.
function stacked(columns) {
  const sums = [columns[0]];
  for (let row = 1; row < columns.length; row += 1) {
    sums.push(columns[row].map((value, at) => (value ?? 0) + (row > 1 ? sums[row - 1][at] : 0)));
  }
  return [sums[0], ...sums.slice(1).reverse()];
}

const DAY = 86400;

function dollars(value) {
  return value.toLocaleString(undefined, { style: "currency", currency: "USD", currencyDisplay: "narrowSymbol", maximumFractionDigits: value < 1 ? 4 : 2 });
}

// The day in UTC, as the bars are.
function dayOf(seconds) {
  return new Date(seconds * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short", timeZone: "UTC" });
}

// The hour, and at midnight the day.
function hourOf(seconds) {
  const at = new Date(seconds * 1000);
  return at.getHours() === 0
    ? at.toLocaleDateString(undefined, { weekday: "short", day: "numeric" })
    : at.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
}

function options(figure, chart, width) {
  const ink = colour("--muted");
  const line = colour("--line");
  const font = `11px ${getComputedStyle(document.body).fontFamily}`;
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { show: false }, font };
  const series = [...chart.series].reverse().map((each) => ({
    label: each,
    fill: colour(`--${each}`),
    stroke: colour(`--${each}`),
    width: 0,
    paths: uPlot.paths.bars({ size: [0.72, 42], radius: 0.12 }),
    points: { show: false },
  }));
  const daily = chart.step === DAY;
  const least = chart.money ? 0.01 : 4;
  const top = (high) => (chart.money ? high * 1.08 : Math.ceil(high * 1.08));
  return {
    width,
    ...(daily ? { tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "UTC") } : {}),
    height: Number(figure.dataset.height || 190),
    legend: { show: false },
    cursor: { points: { show: false }, y: false, drag: { setScale: false } },
    scales: {
      x: { time: true, range: (_, low, high) => [low - chart.step * 0.6, high + chart.step * 0.6] },
      y: { range: (_, low, high) => [0, Math.max(least, top(high))] },
    },
    axes: [
      { ...axis, grid: { show: false }, size: 26, space: 46, values: (_, ticks) => ticks.map(daily ? dayOf : hourOf) },
      chart.money ? { ...axis, size: 60, values: (_, ticks) => ticks.map(dollars) } : { ...axis, size: 40, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000] },
    ],
    series: [{}, ...series],
    hooks: { setCursor: [(plot) => describe(figure, chart, plot.cursor.idx)] },
  };
}

// Shows the values under the pointer as text.
function describe(figure, chart, at) {
  const place = figure.querySelector(".reading");
  if (!place) return;
  if (at == null) {
    place.textContent = place.dataset.idle ?? "";
    return;
  }
  const from = new Date(chart.columns[0][at] * 1000);
  const when = chart.step === DAY
    ? `${dayOf(chart.columns[0][at])} (UTC)`
    : from.toLocaleString(undefined, { weekday: "short", hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  const shown = (value) => (chart.money ? dollars(value) : value);
  const parts = chart.series.map((each, row) => `${each} ${shown(chart.columns[row + 1][at] ?? 0)}`);
  place.textContent = `${when}: ${parts.join(", ")}`;
}

function draw(figure) {
  const place = figure.querySelector(".plot");
  const chart = JSON.parse(figure.dataset.chart);
  const width = place.clientWidth;
  if (!width) return;
  const before = drawn.get(figure);
  before?.plot.destroy();
  const plot = new uPlot(options(figure, chart, width), stacked(chart.columns), place);
  drawn.set(figure, { plot, data: figure.dataset.chart, width });
}

function drawAll(force = false) {
  if (!window.uPlot) return;
  for (const [figure, { plot }] of drawn) {
    if (!figure.isConnected) {
      plot.destroy();
      drawn.delete(figure);
    }
  }
  for (const figure of figures()) {
    const before = drawn.get(figure);
    const same = before && before.data === figure.dataset.chart
      && before.width === figure.querySelector(".plot").clientWidth;
    if (force || !same) draw(figure);
  }
}

drawAll();
document.addEventListener("theme", () => drawAll(true));
document.addEventListener("htmx:after:swap", () => drawAll());
addEventListener("resize", () => drawAll());
