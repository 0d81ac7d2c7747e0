// Shows times in the viewer's time zone. The page contains UTC, which stays in each title.
const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
const clock = new Intl.DateTimeFormat(undefined, {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});
const today = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});
const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];

function ago(at, now) {
  const seconds = Math.round((now - at) / 1000);
  const size = Math.abs(seconds);
  if (size < 2) return "now";
  const [unit, length] = UNITS.find(([, each]) => size >= each);
  const span = `${Math.floor(size / length)} ${unit}`;
  return seconds > 0 ? `${span} ago` : `in ${span}`;
}

function label(element) {
  const at = new Date(element.dateTime);
  if (Number.isNaN(at.getTime())) return element.textContent;
  const now = new Date();
  if (element.dataset.style === "ago") return ago(at, now);
  return at.toDateString() === now.toDateString() ? today.format(at) : clock.format(at);
}

function update(element) {
  const text = label(element);
  if (element.textContent !== text) element.textContent = text;
}

const updateAll = (within = document) => within.querySelectorAll("time[datetime]").forEach(update);

// Date fields: shown in the viewer's time zone, sent in UTC.
function localise(input) {
  const pad = (number) => String(number).padStart(2, "0");
  const utc = document.createElement("input");
  utc.type = "hidden";
  utc.name = input.name;
  utc.value = input.value ? `${input.value}Z` : "";
  const chosen = utc.value ? new Date(utc.value) : null;
  input.removeAttribute("name");
  input.after(utc);
  if (chosen && !Number.isNaN(chosen.getTime())) {
    input.value = `${chosen.getFullYear()}-${pad(chosen.getMonth() + 1)}-${pad(chosen.getDate())}T${pad(chosen.getHours())}:${pad(chosen.getMinutes())}`;
  }
  input.addEventListener("change", () => {
    utc.value = input.value ? new Date(input.value).toISOString().replace(/\.\d+Z$/, "Z") : "";
  }, true);
}

document.querySelectorAll("input[data-local]").forEach(localise);
document.querySelectorAll("[data-zone]").forEach((element) => { element.textContent = "(your time)"; });
document.getElementById("zone")?.replaceChildren(zone || "your zone");
updateAll();
setInterval(() => { if (!document.hidden) updateAll(); }, 1000);
// What is inserted later is updated before it is painted.
new MutationObserver((changes) => {
  for (const change of changes) {
    const target = change.target.nodeType === 1 ? change.target : change.target.parentElement;
    const time = target?.closest("time[datetime]");
    if (time) update(time);
    else if (change.type === "childList" && change.addedNodes.length) updateAll(target);
  }
}).observe(document.getElementById("main"), {
  subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["datetime"],
});
