// What htmx sends and swaps: short addresses, and no error page in the middle of a page.
document.addEventListener("htmx:config:request", (event) => {
  const { request } = event.detail.ctx;
  if (request.method !== "GET" || !request.body?.entries) return;
  for (const [name, value] of [...request.body.entries()]) if (value === "") request.body.delete(name);
});

export function say(kind, text) {
  const place = document.getElementById("said") ?? document.getElementById("main").appendChild(
    Object.assign(document.createElement("div"), { id: "said" }),
  );
  place.setAttribute("role", "status");
  const words = document.createElement("p");
  words.className = `said ${kind}`;
  words.textContent = text;
  place.replaceChildren(words);
}

const isRefresh = (ctx) => ctx.sourceElement?.id === "live";

document.addEventListener("htmx:before:swap", (event) => {
  const { ctx } = event.detail;
  if (!ctx.response || ctx.response.status < 400) return;
  event.preventDefault();
  if (isRefresh(ctx)) return; // the sign at the top says that it is not live
  const page = new DOMParser().parseFromString(ctx.text, "text/html");
  say("bad", page.querySelector("main p")?.textContent ?? "That did not work.");
});

document.addEventListener("htmx:error", (event) => {
  const ctx = event.detail?.ctx;
  if (ctx && !isRefresh(ctx)) say("bad", "The tracker does not answer. Is it running?");
});
