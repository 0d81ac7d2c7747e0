// Shows times in the viewer's time zone. The page contains UTC, which stays in each title.
//
// A plain script in the head: it watches the page while that is parsed, so that a time is never
// painted in UTC first.
(() => {
  const KEY = "exact-times";
  const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const hourAndMinute = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  const day = { day: "numeric", month: "short" };
  const format = (options) => new Intl.DateTimeFormat(undefined, options);
  // By style: what is shown of a time of today, and of any other day.
  const FORMATS = {
    clock: [format({ ...hourAndMinute, second: "2-digit" }), format({ year: "numeric", ...day, ...hourAndMinute, second: "2-digit" })],
    minute: [format(hourAndMinute), format({ ...day, ...hourAndMinute })],
  };
  let exact = false;
  try {
    exact = localStorage.getItem(KEY) === "yes";
  } catch {
    // Storage may be disabled; then the choice lasts for this page.
  }

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
    const { style } = element.dataset;
    if (style === "ago" && exact === ("exact" in element.dataset)) return ago(at, now);
    const [today, other] = FORMATS[style] ?? FORMATS.clock;
    return (at.toDateString() === now.toDateString() ? today : other).format(at);
  }

  function update(element) {
    const text = label(element);
    if (element.textContent !== text) element.textContent = text;
  }

  const updateAll = (within = document) => within.querySelectorAll("time[datetime]").forEach(update);

  new MutationObserver((changes) => {
    for (const { target, addedNodes } of changes) {
      const time = (target.nodeType === 1 ? target : target.parentElement)?.closest("time[datetime]");
      if (time) update(time);
      for (const node of addedNodes) {
        if (node.nodeType !== 1) continue;
        if (node.matches("time[datetime]")) update(node);
        else updateAll(node);
      }
    }
  }).observe(document.documentElement, {
    subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["datetime", "data-exact"],
  });
  setInterval(() => { if (!document.hidden) updateAll(); }, 1000);

  // A tap on a relative time shows the exact one; the button at the bottom does so for all.
  document.addEventListener("click", ({ target }) => {
    const time = target.closest?.("time[data-style=ago]");
    if (time && !time.closest("a, button, summary")) time.toggleAttribute("data-exact");
  });
  document.addEventListener("DOMContentLoaded", () => {
    const { timeZone } = Intl.DateTimeFormat().resolvedOptions();
    document.getElementById("zone")?.replaceChildren(timeZone || "your zone");
    const button = document.getElementById(KEY);
    button.hidden = false;
    button.setAttribute("aria-pressed", exact);
    button.addEventListener("click", () => {
      exact = !exact;
      button.setAttribute("aria-pressed", exact);
      document.querySelectorAll("[data-exact]").forEach((each) => each.removeAttribute("data-exact"));
      try {
        localStorage.setItem(KEY, exact ? "yes" : "no");
      } catch {
        // It lasts for this page.
      }
      updateAll();
    });
  });
})();
