// Explains an image or a player that does not load, instead of a broken icon; a small picture in a
// list becomes an icon.
const EXPLANATIONS = {
  IMG: "The image does not load. FLORA's links expire.",
  VIDEO: "The video does not play. Its link has expired, or the browser does not support its format.",
  AUDIO: "The sound does not play. Its link has expired, or the browser does not support its format.",
};

function broken(media) {
  media.closest(".thumb")?.classList.add("broken"); // its icon stays
  const frame = media.closest(".frame");
  if (!frame || frame.nextElementSibling?.classList.contains("gone")) return;
  const note = document.createElement("p");
  note.className = "gone";
  note.textContent = EXPLANATIONS[media.tagName];
  frame.classList.add("broken");
  frame.after(note);
}

document.addEventListener("error", (event) => {
  if (event.target instanceof Element && event.target.matches("[data-media]")) broken(event.target);
}, true);

// Media that failed before this module was loaded. A live update removes the class and the
// explanation, so that they are looked for after each.
function findBroken() {
  document.querySelectorAll("img[data-media]").forEach((image) => {
    // An SVG without a size has no width either, in Firefox, although it has loaded.
    const isDoubtful = image.complete && image.naturalWidth === 0 && image.currentSrc;
    if (isDoubtful) image.decode().catch(() => broken(image));
  });
  document.querySelectorAll("video[data-media], audio[data-media]").forEach((media) => {
    if (media.error) broken(media);
  });
}

findBroken();
document.addEventListener("htmx:after:swap", findBroken);
