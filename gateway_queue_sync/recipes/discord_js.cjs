'use strict';
// For discord.js and @discordjs/ws: shards identify when a broker says so.
//
//   const { BrokerThrottler } = require('./discord_js.cjs'); // this file
//   const client = new Client({ intents, ws: {
//     buildIdentifyThrottler: (manager) => new BrokerThrottler('http://127.0.0.1:8787', { manager }),
//   } });
//
// With @discordjs/ws alone: new WebSocketManager({ buildIdentifyThrottler: ... }). It works with worker
// strategies, too: there the throttler is in the main thread. You may change HEAD_START and REPORT_TIMEOUT.
// Needs Node.js 18.

const { randomUUID } = require('node:crypto');
const { setTimeout: sleep } = require('node:timers/promises');

const HEAD_START = 60; // s that a shard which identified before is ahead of a cold start
const REPORT_TIMEOUT = 1000; // ms
const UNAUTHORIZED = new Set([401, 403]);
const INVALID_SESSION = 1000; // the code that @discordjs/ws closes with when the gateway says so

class BrokerThrottler {
  #url;
  #headers;
  #name = randomUUID();
  #identified = new Set();
  #granted = new Set(); // shards with a permit whose IDENTIFY the manager has not mentioned yet
  #unanswered = new Set(); // shards whose IDENTIFY has no answer yet
  #closed = new AbortController();
  #manager;
  #warned = false;

  /**
   * @param {string} url the broker's
   * @param {{ secret?: string, pause?: number, manager?: WebSocketManager }} [options] the broker's secret;
   *   how many milliseconds to wait, at most, before the broker is asked again when it is away; the manager
   *   of @discordjs/ws, whose events say when an IDENTIFY is sent, and whether the gateway refused it
   */
  constructor(url, { secret, pause = 1000, manager } = {}) {
    this.#url = url.replace(/\/+$/, '');
    this.#headers = { 'Gateway-Queue': '1' };
    if (secret) this.#headers.Authorization = `Bearer ${secret}`;
    this.pause = pause;
    this.#manager = manager;
    // Version 1 of @discordjs/ws adds the shard to the data of an event, version 2 passes it second.
    manager?.on('debug', (data, shardId = data.shardId) => {
      const message = data.message ?? data;
      if (message.startsWith('Identifying')) this.#sent(shardId); // a worker may have been busy until then
    });
    manager?.on('ready', (data, shardId = data.shardId) => {
      this.#sent(shardId);
      this.#unanswered.delete(shardId);
    });
    manager?.on('closed', (data, shardId = data.shardId) => {
      this.#sent(shardId);
      if ((data.code ?? data) !== INVALID_SESSION) this.#unanswered.delete(shardId);
    });
  }

  /**
   * Wait until the shard may identify. Rejects only when the signal is aborted, because discord.js would
   * identify after an error. An abort leaves the line. A permit that comes then, or while the connection is
   * not open, is given back.
   */
  async waitForIdentify(shardId, signal = new AbortController().signal, isOpen = () => true) {
    const ticket = this.#ticket(shardId);
    const query = new URLSearchParams({ shard: shardId, ticket, confirm: 1 });
    if (this.#identified.has(shardId)) query.set('priority', HEAD_START);
    const ended = either(signal, this.#closed.signal);
    if (this.#unanswered.delete(shardId)) await this.rejected(shardId); // else it would not ask again
    for (;;) {
      if (ended.aborted) return untilAborted(signal);
      let pause = this.pause * Math.random();
      try {
        const response = await this.#ask(`/?${query}`, { signal: ended });
        response.arrayBuffer().catch(() => {}); // so that its connection can be used again
        if (response.status === 200) {
          if (ended.aborted || !isOpen()) {
            this.#report(ticket, 'unused');
            return untilAborted(signal);
          }
          this.#granted.add(shardId);
          if (!this.#manager) this.#sent(shardId); // in the turn of the event loop that sends it
          return;
        } else {
          this.#warn(response.status);
          pause += 1000 * (Number(response.headers.get('Retry-After')) || 0);
        }
      } catch {
        // The broker is away, and holds the position for 30 s; or the wait was aborted, perhaps just when
        // the permit was granted.
        if (ended.aborted) await this.#report(ticket, 'unused');
      }
      await sleep(pause, undefined, { signal: ended }).catch(() => {});
    }
  }

  /** Report that the gateway refused the last IDENTIFY of a shard: its bucket stays closed for longer. */
  async rejected(shardId) {
    await this.#report(this.#ticket(shardId), 'rejected');
  }

  /** Leave the line with all shards. Needed with workers: when one ends, it does not abort its waits. */
  close() {
    this.#closed.abort();
  }

  #sent(shardId) {
    if (!this.#granted.delete(shardId)) return;
    this.#identified.add(shardId);
    if (this.#manager) this.#unanswered.add(shardId);
    this.#report(this.#ticket(shardId), 'sent');
  }

  #ticket(shardId) {
    return `${this.#name}-${shardId}`;
  }

  #ask(path, options) {
    return fetch(this.#url + path, { headers: this.#headers, ...options });
  }

  async #report(ticket, state) {
    const query = new URLSearchParams({ ticket, state });
    const options = { method: 'POST', signal: AbortSignal.timeout(REPORT_TIMEOUT) };
    const asked = this.#ask(`/permit?${query}`, options);
    await asked.then((response) => response.arrayBuffer()).catch(() => {}); // without a report it counts as sent
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
