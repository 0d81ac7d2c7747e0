// Requests of htmx: no empty query fields, nothing to clear without filters, errors as a message instead of a page within a page.
document.addEventListener("htmx:config:request", (event) => {
  const { request } = event.detail.ctx;
  if (request.method !== "GET" || !request.body?.entries) return;
  for (const [name, value] of [...request.body.entries()]) if (value === "") request.body.delete(name);
  const clear = event.detail.ctx.sourceElement.querySelector?.(".filters .clear");
  if (clear) clear.hidden = [...request.body.keys()].length === 0;
});

function flash(kind, text) {
  const place = document.getElementById("flash") ?? document.getElementById("main").appendChild(
    Object.assign(document.createElement("div"), { id: "flash" }),
  );
  place.setAttribute("role", "status");
  const message = document.createElement("p");
  message.className = `message ${kind}`;
  message.textContent = text;
  place.replaceChildren(message);
}

const isRefresh = (ctx) => ctx.sourceElement?.id === "live";

document.addEventListener("htmx:before:swap", (event) => {
  const { ctx } = event.detail;
  if (!ctx.response || ctx.response.status < 400) return;
  event.preventDefault();
  if (isRefresh(ctx)) return; // the indicator at the top shows that the page is offline
  const page = new DOMParser().parseFromString(ctx.text, "text/html");
  flash("bad", page.querySelector("main p")?.textContent ?? "The action failed.");
});

document.addEventListener("htmx:error", (event) => {
  const ctx = event.detail?.ctx;
  if (ctx && !isRefresh(ctx)) flash("bad", "The tracker does not answer. Is it running?");
});

// A question that was answered is closed.
document.addEventListener("submit", ({ target }) => {
  target.querySelectorAll("details.confirm[open]").forEach((each) => { each.open = false; });
});
