'use strict';
// For discord.js and @discordjs/ws: shards identify when a broker says so.
//
//   const { BrokerThrottler } = require('./discord_js.cjs'); // this file
//   const client = new Client({ intents, ws: {
//     buildIdentifyThrottler: () => new BrokerThrottler('http://127.0.0.1:8787'),
//   } });
//
// Of @discordjs/ws alone: new WebSocketManager({ buildIdentifyThrottler: ... }). Needs Node.js 18.

const { randomUUID } = require('node:crypto');
const { setTimeout: sleep } = require('node:timers/promises');

const HEAD_START = 60; // s that a shard which identified before is ahead of a cold start
const REPORT_TIMEOUT = 1000; // ms
const UNAUTHORIZED = new Set([401, 403]);

class BrokerThrottler {
  #url;
  #headers;
  #name = randomUUID();
  #identified = new Set();
  #closed = new AbortController();
  #warned = false;

  /**
   * @param {string} url the broker's
   * @param {{ secret?: string, pause?: number }} [options] the broker's secret; how many milliseconds to
   *   wait, at most, before the broker is asked again when it is away
   */
  constructor(url, { secret, pause = 1000 } = {}) {
    this.#url = url.replace(/\/+$/, '');
    this.#headers = { 'Gateway-Queue': '1' };
    if (secret) this.#headers.Authorization = `Bearer ${secret}`;
    this.pause = pause;
  }

  /**
   * Wait until the shard may identify. Rejects when the signal is aborted, and never else: discord.js would
   * identify after an error. An abort leaves the line. A permit that comes then, or while the connection is
   * not open, is given back.
   */
  async waitForIdentify(shardId, signal = new AbortController().signal, isOpen = () => true) {
    const ticket = `${this.#name}-${shardId}`;
    const query = new URLSearchParams({ shard: shardId, ticket, confirm: 1 });
    if (this.#identified.has(shardId)) query.set('priority', HEAD_START);
    const ended = either(signal, this.#closed.signal);
    for (;;) {
      if (ended.aborted) return untilAborted(signal);
      let pause = this.pause * Math.random();
      try {
        const response = await this.#ask(`/?${query}`, { signal: ended });
        response.arrayBuffer().catch(() => {}); // so that its connection can be used again
        if (response.status === 200) {
          const isUsed = !ended.aborted && isOpen();
          this.#report(ticket, isUsed ? 'sent' : 'unused'); // in the turn of the event loop that sends it
          if (!isUsed) return untilAborted(signal);
          this.#identified.add(shardId);
          return;
        } else {
          this.#warn(response.status);
          pause += 1000 * (Number(response.headers.get('Retry-After')) || 0);
        }
      } catch {
        // The broker is away, and holds the position for 30 s; or it was aborted, just granted perhaps.
        if (ended.aborted) await this.#report(ticket, 'unused');
      }
      await sleep(pause, undefined, { signal: ended }).catch(() => {});
    }
  }

  /** Leave the line with all shards, for worker strategies: a worker that ends does not abort. */
  close() {
    this.#closed.abort();
  }

  #ask(path, options) {
    return fetch(this.#url + path, { headers: this.#headers, ...options });
  }

  async #report(ticket, state) {
    const query = new URLSearchParams({ ticket, state });
    const options = { method: 'POST', signal: AbortSignal.timeout(REPORT_TIMEOUT) };
    const asked = this.#ask(`/permit?${query}`, options);
    await asked.then((response) => response.arrayBuffer()).catch(() => {}); // it counts as sent then
  }

  #warn(status) {
    if (UNAUTHORIZED.has(status) && !this.#warned) {
      this.#warned = true;
      process.emitWarning(`the broker at ${this.#url} answers ${status}: is the secret right?`);
    }
  }
}

function either(...signals) {
  const either = new AbortController(); // AbortSignal.any needs Node.js 20
  for (const signal of signals) {
    const abort = () => either.abort(signal.reason);
    if (signal.aborted) abort();
    else signal.addEventListener('abort', abort, { once: true, signal: either.signal });
  }
  return either.signal;
}

function untilAborted(signal) {
  return new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener('abort', () => reject(signal.reason));
  });
}

module.exports = { BrokerThrottler };
