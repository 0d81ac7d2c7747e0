// The smallest server that hands what comes to Stripe Sync Engine, and answers when it has kept it.
// Anything but a POST is answered at once: that is how the benchmark learns that it is ready.

import { createServer } from "node:http";
import { createRequire } from "node:module";

// Its other build cannot find its own migrations: it asks for __dirname, which modules do not have.
const require = createRequire(import.meta.url);
const { runMigrations, StripeSync } = require("@supabase/stripe-sync-engine");

const { DATABASE_URL, PORT, STRIPE_WEBHOOK_SECRET } = process.env;

const logger = {
  info() {},
  error(reason) {
    throw reason; // else a failed migration would be passed over
  },
};
await runMigrations({ databaseUrl: DATABASE_URL, schema: "stripe", logger });

const sync = new StripeSync({
  poolConfig: { connectionString: DATABASE_URL, max: 20 }, // as many as the peer of bench.ingest
  stripeSecretKey: "sk_test_of_nobody", // nothing here asks Stripe
  stripeWebhookSecret: STRIPE_WEBHOOK_SECRET,
});

async function take(body, signature, response) {
  try {
    await sync.processWebhook(body, signature);
    response.writeHead(200, { "Content-Type": "application/json" });
    response.end('{"received":true}');
  } catch (reason) {
    console.error(reason);
    response.writeHead(400).end();
  }
}

createServer((request, response) => {
  if (request.method !== "POST") {
    response.end();
    return;
  }
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    take(Buffer.concat(parts), request.headers["stripe-signature"], response);
  });
}).listen(Number(PORT), "127.0.0.1");
