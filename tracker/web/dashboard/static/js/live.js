// Keeps the page up to date: when the stream reports a change, the live part of the page is loaded
// again. A page in the background loads nothing.
const live = () => document.getElementById("live");
const indicator = document.getElementById("live-state");
const LABELS = { on: "live", waiting: "connecting", off: "offline" };
const DEBOUNCE = 400; // milliseconds: changes that come together are shown together
const MIN_INTERVAL = { runs: 1500, run: 500, any: 3000, slow: 60000 }; // milliseconds between refreshes
const MAX_INTERVAL = 15000; // refresh without an event, too: the stream reports changes of runs only
let stream = null;
let timer = null;
let refreshed = Date.now();
let retry = null;
let wait = 1000;

function show(state) {
  if (!indicator) return;
  indicator.hidden = false;
  indicator.dataset.state = state;
  indicator.querySelector(".word").textContent = LABELS[state];
}

function soon() {
  if (timer || document.hidden) return;
  const part = live();
  if (!part) return;
  const earliest = refreshed + (MIN_INTERVAL[part.dataset.live] ?? 3000);
  timer = setTimeout(refresh, Math.max(DEBOUNCE, earliest - Date.now()));
}

async function refresh() {
  timer = null;
  const part = live();
  if (!part || document.hidden) return;
  refreshed = Date.now();
  await htmx.ajax("GET", location.pathname + location.search, {
    source: part, target: part, select: "#live", swap: "outerMorph",
  });
}

// The page of a run follows that run alone.
function source() {
  const { stream: address } = indicator.dataset;
  const { live: kind, run } = live().dataset;
  return kind === "run" ? `${address}?run_id=${encodeURIComponent(run)}` : address;
}

function open() {
  clearTimeout(retry);
  if (stream || !live() || live().dataset.live === "slow") return;
  show("waiting");
  stream = new EventSource(source());
  stream.onopen = () => {
    wait = 1000;
    show("on");
    soon(); // changes before it was open
  };
  stream.onerror = () => {
    show("waiting");
    if (stream?.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    stream = null;
    show("off");
    retry = setTimeout(open, wait);
    wait = Math.min(2 * wait, 30000);
  };
  stream.addEventListener("run", soon);
  stream.addEventListener("reset", soon); // events may be missing
}

function close() {
  clearTimeout(timer);
  timer = null;
  clearTimeout(retry);
  stream?.close();
  stream = null;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return close();
  open();
  soon();
});
addEventListener("pagehide", close);
addEventListener("pageshow", (event) => { if (event.persisted) { open(); soon(); } });
setInterval(() => { if (Date.now() - refreshed > MAX_INTERVAL) soon(); }, 5000);
open();
