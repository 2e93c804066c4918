// For @discordeno/gateway: its shards identify when a broker says so.
//
//   import { BrokerThrottler } from './discord_js.cjs';
//   import { queuedPresence } from './discordeno.mjs'; // this file
//   createGatewayManager({
//     ...options,
//     spawnShardDelay: 0, // its own limiter is off
//     makePresence: queuedPresence(new BrokerThrottler('http://127.0.0.1:8787')),
//   });

const watched = new WeakSet(); // events of shards

/** Return a `makePresence` that waits: a shard calls it between its connection and its IDENTIFY. */
export function queuedPresence(throttler, makePresence = async () => undefined) {
  return async function () {
    if (!watched.has(this.events)) watch(this.events, throttler);
    const controller = new AbortController();
    const { socket } = this;
    if (!socket) return new Promise(() => {}); // closed: the shard calls again when it has connected
    socket.addEventListener('close', () => controller.abort());
    try {
      await throttler.waitForIdentify(this.id, controller.signal, () => this.isOpen());
    } catch {
      return new Promise(() => {}); // else the IDENTIFY would be sent over the next connection
    }
    return makePresence.call(this);
  };
}

/** Report the IDENTIFYs that the gateway refuses: those that still wait for READY then. */
function watch(events, throttler) {
  const { invalidSession } = events;
  watched.add(events);
  events.invalidSession = (shard, resumable) => {
    if (shard.resolves.has('READY')) throttler.rejected(shard.id);
    invalidSession?.(shard, resumable);
  };
}
