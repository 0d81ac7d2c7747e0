// Switches between light and dark. Choosing the system's theme follows the system again.
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
    // Then the choice applies to this page alone.
  }
  update();
}

function update() {
  if (button) {
    const label = isDark() ? "Switch to light" : "Switch to dark";
    button.querySelector(".sr").textContent = label;
    button.title = label;
  }
  document.dispatchEvent(new CustomEvent("theme"));
}

if (button) {
  button.hidden = false;
  button.addEventListener("click", () => choose(!isDark()));
}
system.addEventListener("change", update);
update();
