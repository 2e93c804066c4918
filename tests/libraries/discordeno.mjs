// A bot on @discordeno/gateway: it ends when it reads a line.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import { BrokerThrottler } from '../../gateway_queue_sync/recipes/discord_js.cjs';
import { queuedPresence } from '../../gateway_queue_sync/recipes/discordeno.mjs';

const { resolve } = createRequire(import.meta.url); // import does not look in NODE_PATH
const path = resolve('@discordeno/gateway').replace('/cjs/', '/esm/').replace(/\.cjs$/, '.js');
const { createGatewayManager } = await import(pathToFileURL(path));
const how = JSON.parse(process.argv[2]);
const limit = { total: 1000, remaining: 1000, resetAfter: 0, maxConcurrency: 4 };
const quiet = { debug() {}, info() {}, warn: console.error, error: console.error };
const gateway = createGatewayManager({
  token: how.token,
  intents: 1,
  totalShards: how.shards,
  connection: { url: how.url, shards: how.shards, sessionStartLimit: limit },
  resharding: { enabled: false },
  logger: process.env.DEBUG ? console : quiet,
  spawnShardDelay: 0,
  makePresence: queuedPresence(new BrokerThrottler(how.broker, { pause: 100 })),
});
process.on('unhandledRejection', console.error);
gateway.spawnShards();
process.stdin.once('data', async () => {
  await gateway.shutdown(3000, 'closed');
  setTimeout(() => process.exit(0), 200); // what is granted just now is given back
});
