// The button between light and dark. Choosing what the system has anyway follows the system again.
const root = document.documentElement;
const button = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");

const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

function choose(dark) {
  const follow = dark === system.matches;
  if (follow) delete root.dataset.theme;
  else root.dataset.theme = dark ? "dark" : "light";
  try {
    if (follow) localStorage.removeItem("theme");
    else localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // The choice then holds for this page alone.
  }
  tell();
}

function tell() {
  if (button) {
    const words = isDark() ? "Switch to light" : "Switch to dark";
    button.querySelector(".sr").textContent = words;
    button.title = words;
  }
  document.dispatchEvent(new CustomEvent("theme"));
}

if (button) {
  button.hidden = false;
  button.addEventListener("click", () => choose(!isDark()));
}
system.addEventListener("change", tell);
tell();
