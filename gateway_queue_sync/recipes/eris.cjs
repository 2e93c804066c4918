'use strict';
// For eris, oceanic.js and seyfert: their shards identify when a broker says so.
//
//   const { Client, Shard } = require('eris'); // or oceanic.js; seyfert has its Shard in seyfert/lib/websocket
//   const { BrokerThrottler } = require('./discord_js.cjs');
//   const { queueIdentify } = require('./eris.cjs'); // this file
//   queueIdentify(Shard, new BrokerThrottler('http://127.0.0.1:8787')); // before any client connects
//
// Turn the library's own limiter off, with a concurrency as large as the number of shards:
// `shardConcurrency` of eris, `gateway.concurrency` of oceanic.js; of seyfert's ShardManager set
// `connectQueue = { push: (connect) => connect() }`.

const LOOK = 250; // ms between two looks at whether a connection is open

function queueIdentify(Shard, throttler) {
  const { identify } = Shard.prototype;
  const waiting = new WeakMap(); // what ends the wait of a shard
  const socketOf = (shard) => shard.ws ?? shard.websocket;

  Shard.prototype.identify = async function () {
    waiting.get(this)?.abort();
    const controller = new AbortController();
    waiting.set(this, controller);
    const socket = socketOf(this);
    const isOpen = () => socketOf(this) === socket && socket?.readyState === 1;
    const looking = setInterval(() => isOpen() || controller.abort(), LOOK);
    try {
      await throttler.waitForIdentify(this.id, controller.signal, isOpen);
    } catch {
      return; // the connection is closed; the next one asks again
    } finally {
      clearInterval(looking);
    }
    await identify.call(this);
  };
}

module.exports = { queueIdentify };
