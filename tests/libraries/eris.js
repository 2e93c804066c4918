'use strict';
// A bot on eris or oceanic.js: it ends when it reads a line.
const how = JSON.parse(process.argv[2]);
const { Client, Shard } = require(how.library);
const { BrokerThrottler } = require('../../gateway_queue_sync/recipes/discord_js.cjs');
const { queueIdentify } = require('../../gateway_queue_sync/recipes/eris.cjs');

queueIdentify(Shard, new BrokerThrottler(how.broker, { pause: 100 }));
const limit = { total: 1000, remaining: 1000, resetAfter: 0, maxConcurrency: how.shards };
const gateway = { url: how.url, shards: how.shards, session_start_limit: limit, sessionStartLimit: limit };
let client;
if (how.library === 'eris') {
  client = new Client(how.token, {
    intents: ['guilds'],
    maxShards: how.shards,
    shardConcurrency: how.shards,
    reconnectDelay: () => 100,
  });
  client.getBotGateway = client.getGateway = async () => gateway;
} else {
  client = new Client({
    auth: `Bot ${how.token}`,
    gateway: {
      intents: ['GUILDS'],
      maxShards: how.shards,
      concurrency: how.shards,
      reconnectDelay: () => 100,
    },
    rest: { baseURL: `${how.api}/api/v10` },
  });
  client.rest.getBotGateway = client.rest.getGateway = async () => gateway;
}
client.on('error', console.error);
if (process.env.DEBUG) client.on('warn', console.log).on('debug', console.log);
client.connect();
process.stdin.once('data', () => {
  client.disconnect(false);
  setTimeout(() => process.exit(0), 200);
});
