// Buttons that copy a value, shown only where the browser allows it.
if (navigator.clipboard) {
  document.documentElement.classList.add("copies");
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("button[data-copy]");
    if (!button) return;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.classList.add("done");
    } catch {
      button.classList.add("failed");
    }
    setTimeout(() => button.classList.remove("done", "failed"), 1500);
  });
}
