// Keeps the page as things are: the stream says that something changed, and the part of the page
// that shows it is asked for again. While nobody looks, nothing is asked.
const live = () => document.getElementById("live");
const sign = document.getElementById("live-state");
const WORDS = { on: "live", waiting: "connecting", off: "not live" };
const SOON = 400; // milliseconds: changes that come together are shown together
const AT_MOST = { runs: 1500, run: 500, any: 3000, slow: 60000 }; // one refresh in so many milliseconds
const ANYWAY = 20000; // a refresh even if the stream says nothing: not everything is a run's change
let stream = null;
let timer = null;
let refreshed = Date.now();
let retry = null;
let wait = 1000;

function show(state) {
  if (!sign) return;
  sign.hidden = false;
  sign.dataset.state = state;
  sign.querySelector(".word").textContent = WORDS[state];
}

function soon() {
  if (timer || document.hidden) return;
  const part = live();
  if (!part) return;
  const earliest = refreshed + (AT_MOST[part.dataset.live] ?? 3000);
  timer = setTimeout(refresh, Math.max(SOON, earliest - Date.now()));
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

// One run's page hears of that run alone.
function source() {
  const { live: kind, run } = live().dataset;
  return kind === "run" ? `/api/stream?run_id=${encodeURIComponent(run)}` : "/api/stream";
}

function open() {
  clearTimeout(retry);
  if (stream || !live() || live().dataset.live === "slow") return;
  show("waiting");
  stream = new EventSource(source());
  stream.onopen = () => {
    wait = 1000;
    show("on");
    soon(); // what happened before it was open
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
  stream.addEventListener("reset", soon); // something may have been missed
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
setInterval(() => { if (Date.now() - refreshed > ANYWAY) soon(); }, 5000);
open();
