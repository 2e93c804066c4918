'use strict';
// A bot on seyfert: it ends when it reads a line.
const http = require('node:http');
const https = require('node:https');
const how = JSON.parse(process.argv[2]);
// It speaks TLS to port 443 alone, and drops what comes together with the end of the handshake.
https.request = (options) =>
  http
    .request({ ...options, port: new URL(how.url).port })
    .prependListener('upgrade', (_, socket, head) => head.length && socket.unshift(head));
const { ShardManager } = require('seyfert');
const { Shard } = require('seyfert/lib/websocket');
const { BrokerThrottler } = require('../../gateway_queue_sync/recipes/discord_js.cjs');
const { queueIdentify } = require('../../gateway_queue_sync/recipes/eris.cjs');

const limit = { total: 1000, remaining: 1000, reset_after: 0, max_concurrency: 4 };
queueIdentify(Shard, new BrokerThrottler(how.broker, { pause: 100 }));
const manager = new ShardManager({
  token: how.token,
  intents: 1,
  info: { url: how.url, shards: how.shards, session_start_limit: limit },
  handlePayload() {},
  resharding: { interval: 0 },
  debug: Boolean(process.env.DEBUG),
  reconnectTimeout: 100,
});
manager.connectQueue = { push: (connect) => connect() };
process.on('unhandledRejection', console.error);
manager.spawnShards();
process.stdin.once('data', () => {
  manager.disconnectAll();
  setTimeout(() => process.exit(0), 500);
});
