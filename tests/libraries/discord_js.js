'use strict';
// A bot on discord.js, with the throttler: it ends when it reads a line.
const { Client, GatewayIntentBits } = require('discord.js');
const { BrokerThrottler } = require('../../gateway_queue_sync/recipes/discord_js.cjs');

const how = JSON.parse(process.argv[2]);
const client = new Client({
  intents: [GatewayIntentBits.Guilds],
  shards: how.shard_ids ?? [...Array(how.shards).keys()],
  shardCount: how.shards,
  rest: { api: `${how.api}/api` },
  ws: { buildIdentifyThrottler: () => new BrokerThrottler(how.broker, { pause: 100 }) },
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
process.stdin.once('data', async () => {
  await client.destroy();
  process.exit(0);
});
