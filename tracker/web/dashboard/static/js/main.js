// What every page has: each module is one idea.
import "./toggle.js";
import "./time.js";
import "./media.js";
import "./copy.js";
import "./requests.js";
import "./live.js";
import "./charts.js";
