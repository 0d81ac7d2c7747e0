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
