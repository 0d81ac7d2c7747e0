// A tour of the simulator with FLORA's official SDK, unchanged: what it saw is printed as JSON.
// FLORA_BASE_URL, FLORA_API_KEY and FLORA_WEBHOOK_SECRET say where and with what.

import { createServer } from 'node:http';
import { once } from 'node:events';
import FLORA from '@flora-ai/flora';

const secret = process.env.FLORA_WEBHOOK_SECRET;
const client = new FLORA();

// A receiver of callbacks that unwraps them as FLORA's documentation says.
const unwrapped = new Map();
const waiting = new Map();
const receiver = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const raw = Buffer.concat(chunks);
  try {
    const event = await client.webhooks.unwrap(raw, request.headers, secret);
    const mirrored =
      request.headers['flora-webhook-id'] === event.id &&
      request.headers['flora-event'] === event.type;
    const wrong = await client.webhooks
      .unwrap(raw, request.headers, 'whsec_another')
      .then(() => 'accepted', (error) => error.constructor.name);
    const arrived = { event, mirrored, wrong };
    unwrapped.set(event.data.run_id, arrived);
    waiting.get(event.data.run_id)?.(arrived);
    response.writeHead(204).end();
  } catch (error) {
    console.error(error);
    response.writeHead(401).end();
  }
});
receiver.listen(0, '127.0.0.1');
await once(receiver, 'listening');
const callback_url = `http://127.0.0.1:${receiver.address().port}/callbacks/flora`;

function callbackFor(runId) {
  const arrived = unwrapped.get(runId);
  return arrived ?? new Promise((resolve) => waiting.set(runId, resolve));
}

async function refused(promise) {
  try {
    await promise;
  } catch (error) {
    return {
      type: error.constructor.name,
      status: error.status,
      error: error.error?.error,
      requestId: error.headers?.get('request-id'),
    };
  }
  return null;
}

const techniques = [];
for await (const technique of client.techniques.list({ limit: 15 })) {
  techniques.push(technique.technique_id);
}
const searched = await client.techniques.list({ query: 'mugshot' });
const technique = await client.techniques.retrieve('icon-pack');

const inputs = [{ id: 'prompt', type: 'text', value: 'garden tools' }];
const started = [];
for (let number = 0; number < 5; number++) {
  const run = await client.techniques.runs.create('icon-pack', { inputs, mode: 'async', callback_url });
  started.push(run);
}
const keyed = { inputs, mode: 'async', idempotency_key: 'tour-1' };
const first = await client.techniques.runs.create('icon-pack', keyed);
const replay = await client.techniques.runs.create('icon-pack', keyed).withResponse();

const callbacks = await Promise.all(started.map((run) => callbackFor(run.run_id)));
const ended = await Promise.all(
  started.map((run) => client.techniques.runs.retrieve(run.run_id, { techniqueId: 'icon-pack' })),
);

const history = [];
for await (const item of client.techniques.runs.list({ limit: 2 })) history.push(item);

const generation = await client.generations.create({
  prompt: 'a ceramic mug',
  type: 'image',
  workspace_id: process.env.FLORA_WORKSPACE_ID,
  project_id: 'prj_simulator',
  callback_url,
});
const generationCallback = await callbackFor(generation.run_id);
const generationRead = await client.generations.retrieve(generation.run_id);
const generations = [];
for await (const item of client.generations.list()) generations.push(item);

const stranger = new FLORA({ apiKey: 'sk_test_wrong' });
const errors = {
  badInput: await refused(client.techniques.runs.create('icon-pack', { inputs: [], mode: 'async' })),
  unknown: await refused(client.techniques.retrieve('no-such-technique')),
  badKey: await refused(stranger.techniques.list()),
  usedKey: await refused(
    client.techniques.runs.create('icon-pack', { ...keyed, mode: 'stream' }),
  ),
};

receiver.close();
receiver.closeAllConnections();
console.log(
  JSON.stringify({
    techniques,
    searched: searched.techniques.map((found) => found.technique_id),
    technique,
    started,
    first: first.run_id,
    replay: {
      run_id: replay.data.run_id,
      replayed: replay.response.headers.get('idempotent-replayed'),
    },
    callbacks,
    ended,
    history,
    generation,
    generationCallback,
    generationRead,
    generations,
    errors,
  }),
);
