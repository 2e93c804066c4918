'use strict';
// A bot on discord.js, with the throttler: it ends when it reads a line.
const { createRequire } = require('node:module');
const { setTimeout: sleep } = require('node:timers/promises');
const { Client, GatewayIntentBits, ShardingManager } = require('discord.js');
const { WorkerShardingStrategy } = createRequire(require.resolve('discord.js'))('@discordjs/ws'); // its own
const { BrokerThrottler } = require('../../gateway_queue_sync/recipes/discord_js.cjs');

const how = JSON.parse(process.argv[2]);

function manage() {
  const options = { totalShards: how.shards, shardArgs: [process.argv[2]], token: how.token };
  const manager = new ShardingManager(__filename, options);
  manager.spawn({ delay: 0, timeout: -1 });
  process.stdin.once('data', () => {
    manager.respawn = false;
    for (const shard of manager.shards.values()) shard.kill();
    process.exit(0);
  });
}

function run() {
  let throttler;
  const all = { shards: how.shard_ids ?? [...Array(how.shards).keys()], shardCount: how.shards };
  const build = (manager) => new WorkerShardingStrategy(manager, { shardsPerWorker: 4 });
  const client = new Client({
    intents: [GatewayIntentBits.Guilds],
    ...(process.env.SHARDING_MANAGER ? {} : all),
    rest: { api: `${how.api}/api` },
    ws: {
      buildIdentifyThrottler(manager) {
        throttler = new BrokerThrottler(how.broker, { pause: 100, manager });
        return throttler;
      },
      ...(how.library === 'discord.js in workers' ? { buildStrategy: build } : {}),
    },
  });
  client.on('error', console.error);
  if (process.env.DEBUG) client.on('debug', console.log);
  if (how.work) {
    setInterval(() => {
      const until = Date.now() + how.work * (0.5 + Math.random());
      while (Date.now() < until);
    }, how.every);
  }
  client.login(how.token).catch(console.error);
  if (process.env.SHARDING_MANAGER) return; // its manager reads the line
  process.stdin.once('data', async () => {
    // With several shards in a worker, the library terminates it after the first, and waits for all.
    await Promise.race([client.destroy(), sleep(1000)]);
    throttler.close();
    await sleep(100);
    process.exit(0);
  });
}

if (how.manager && !process.env.SHARDING_MANAGER) manage();
else run();
