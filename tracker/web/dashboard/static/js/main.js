// The modules of every page.
import "./toggle.js";
import "./dates.js";
import "./media.js";
import "./copy.js";
import "./keys.js";
import "./requests.js";
import "./live.js";
import "./charts.js";
