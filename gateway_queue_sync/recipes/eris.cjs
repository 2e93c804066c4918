'use strict';
// For eris, oceanic.js and seyfert: their shards identify when a broker says so.
//
//   const { Client, Shard } = require('eris'); // or oceanic.js; seyfert has its Shard in seyfert/lib/websocket
//   const { BrokerThrottler } = require('./discord_js.cjs');
//   const { queueIdentify } = require('./eris.cjs'); // this file
//   queueIdentify(Shard, new BrokerThrottler('http://127.0.0.1:8787')); // before any client connects
//
// You may change LOOK. Turn the library's own limiter off, with a concurrency as large as the number of shards:
// `shardConcurrency` of eris, `gateway.concurrency` of oceanic.js; of seyfert's ShardManager set
// `connectQueue = { push: (connect) => connect() }`.

const INVALID_SESSION = 9; // an opcode
const LOOK = 250; // ms between two checks whether a connection is open

/** Let all shards of a library ask a throttler before they identify. */
function queueIdentify(Shard, throttler) {
  const { identify } = Shard.prototype;
  const onPacket = 'onPacket' in Shard.prototype ? 'onPacket' : 'onpacket'; // seyfert's
  const receive = Shard.prototype[onPacket];
  const unanswered = new WeakSet(); // shards that have identified, and have no answer yet
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
    unanswered.add(this);
    await identify.call(this);
  };

  Shard.prototype[onPacket] = function (packet) {
    const isRefused = packet.op === INVALID_SESSION && unanswered.has(this);
    if (isRefused) throttler.rejected(this.id);
    if (isRefused || packet.t === 'READY') unanswered.delete(this);
    return receive.call(this, packet);
  };
}

module.exports = { queueIdentify };
