// A bot on @discordjs/ws alone, its shards in workers: it ends when it reads a line.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import { setTimeout as sleep } from 'node:timers/promises';
import { BrokerThrottler } from '../../gateway_queue_sync/recipes/discord_js.cjs';

const { resolve } = createRequire(import.meta.url); // import does not look in NODE_PATH
const { WebSocketManager, WorkerShardingStrategy } = await import(pathToFileURL(resolve('@discordjs/ws')));
const how = JSON.parse(process.argv[2]);
const limit = { total: 1000, remaining: 1000, reset_after: 0, max_concurrency: 4 };
let throttler;
const manager = new WebSocketManager({
  token: how.token,
  intents: 1,
  shardCount: how.shards,
  rest: { get: async () => ({ url: how.url, shards: how.shards, session_start_limit: limit }) },
  buildStrategy: (manager) => new WorkerShardingStrategy(manager, { shardsPerWorker: 4 }),
  buildIdentifyThrottler(manager) {
    throttler = new BrokerThrottler(how.broker, { pause: 100, manager });
    return throttler;
  },
});
manager.on('error', console.error);
if (process.env.DEBUG) manager.on('debug', console.log);
manager.connect().catch(console.error);
process.stdin.once('data', async () => {
  // With several shards in a worker, the library terminates it after the first, and waits for all.
  await Promise.race([manager.destroy(), sleep(1000)]);
  throttler.close();
  await sleep(100);
  process.exit(0);
});
