// Times in the viewer's zone. The page brings UTC; the exact UTC stays in each title.
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
  const words = `${Math.floor(size / length)} ${unit}`;
  return seconds > 0 ? `${words} ago` : `in ${words}`;
}

function words(element) {
  const at = new Date(element.dateTime);
  if (Number.isNaN(at.getTime())) return element.textContent;
  const now = new Date();
  if (element.dataset.style === "ago") return ago(at, now);
  return at.toDateString() === now.toDateString() ? today.format(at) : clock.format(at);
}

function tell(element) {
  const said = words(element);
  if (element.textContent !== said) element.textContent = said;
}

const tellAll = (within = document) => within.querySelectorAll("time[datetime]").forEach(tell);

// Fields that take a moment: shown in the viewer's zone, sent in UTC.
function localise(input) {
  const pad = (number) => String(number).padStart(2, "0");
  const utc = document.createElement("input");
  utc.type = "hidden";
  utc.name = input.name;
  utc.value = input.value ? `${input.value}Z` : "";
  const given = utc.value ? new Date(utc.value) : null;
  input.removeAttribute("name");
  input.after(utc);
  if (given && !Number.isNaN(given.getTime())) {
    input.value = `${given.getFullYear()}-${pad(given.getMonth() + 1)}-${pad(given.getDate())}T${pad(given.getHours())}:${pad(given.getMinutes())}`;
  }
  input.addEventListener("change", () => {
    utc.value = input.value ? new Date(input.value).toISOString().replace(/\.\d+Z$/, "Z") : "";
  }, true);
}

document.querySelectorAll("input[data-local]").forEach(localise);
document.querySelectorAll("[data-zone]").forEach((element) => { element.textContent = "(your time)"; });
document.getElementById("zone")?.replaceChildren(zone || "your zone");
tellAll();
setInterval(() => { if (!document.hidden) tellAll(); }, 1000);
// What is put into the page later is told before it is painted.
new MutationObserver((changes) => {
  for (const change of changes) {
    const target = change.target.nodeType === 1 ? change.target : change.target.parentElement;
    const time = target?.closest("time[datetime]");
    if (time) tell(time);
    else if (change.type === "childList" && change.addedNodes.length) tellAll(target);
  }
}).observe(document.getElementById("main"), {
  subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["datetime"],
});
