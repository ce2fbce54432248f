// SPDX-License-Identifier: Apache-2.0
//
// A model of include/runtime_bridge.hpp's concurrency: the gate, tickets and answers, cancellation, lazy start, shutdown
// and hard stop. tests/model/run checks every interleaving of it. A step here is one atomic step there, and names the
// function and the line that it stands for. Words that start with a capital and a dot, such as Gate.leave, are the
// header's functions.
//
// What it takes for granted:
// - Memory is sequentially consistent. The header's relaxed loads are first guesses of a compare-exchange, or hints.
// - asio::post puts a handler at the end of a queue under a lock, and is `inside` the context before and after that.
//   Asio moves a handler out of its memory before it calls it.
// - A task starts inline (co_spawn dispatches), ends at a co_await once it was cancelled, and does not throw.
// - Settle's 200 milliseconds are enough for a foreign thread to let go of the context.
// Not in it: rings of waiting bridges, fork, raw handlers, tasks that ignore cancellation (patience, destroy_all), the
// caller's spin, which does nothing but look at the answer.
//
// Configurations, by macros:
//   CALLERS, CLOSERS  how many; every caller has one call, and a call has its caller's number
//   HOW0, HOW1        what the closers do: DRAIN, CANCEL, DTOR (stops at once), or STOP (a user stops the context; then DRAIN)
//   LIMIT             the shutdowns have a limit, which passes at any moment
//   LAZY              Start::lazy; NOTHREAD: and std::thread may fail
//   DEADLINE          the calls have a deadline, which passes at any moment
//   STOPPER           somebody requests a stop of call 0, at any moment
//   FOREVER           tasks may wait for something on this context that never comes
//   FOREIGN           tasks may wait for something foreign
//   DETACHED          the last caller has submitted and detached its call, which nobody else keeps
//   LINGER            the worker lingers after a call, for a while
//   SELF              the task of call 0 destroys the bridge
//   STEPS             how many times a task may wait (1)
//   INSIDE_IS_FINE    do not refuse that services are shut down while a thread is inside asio::post
//   MUTANT_name       a mistake; tests/model/run lists them

#ifndef CALLERS
#define CALLERS 2
#endif
#ifndef CLOSERS
#define CLOSERS 1
#endif
#ifndef HOW0
#define HOW0 DRAIN
#endif
#ifndef HOW1
#define HOW1 DTOR
#endif
#ifndef STEPS
#define STEPS 1
#endif
#ifdef DETACHED
#define IS_DETACHED(c) ((c) == CALLERS - 1)
#else
#define IS_DETACHED(c) false
#endif

mtype = { DRAIN, CANCEL, DTOR, STOP };                    // what a closer does
mtype = { START, EMIT, CANCEL_ALL, RESUME, STEPPED, LINGERS };  // handlers in the queue
mtype = { QUEUED, READY, PARKED, LOST, AWAY, OVER };      // a task: LOST waits for what never comes, AWAY for something foreign
mtype = { NONE, REGISTERED, CALLING, CALLED };            // a std::stop_callback
mtype = { RUN, ABANDON_STEP, ABANDON, SETTLE };           // where the worker is in Core.run

// --- Gate: one word

#define NO_CALLS 1
#define NO_POSTS 2
#define POSTER 4
#define CALL 32
#define POSTERS(w) (((w) % CALL) / POSTER)
#define CALLS(w) ((w) / CALL)

byte word;
bool gate_asleep;  // somebody sleeps in word_.wait

// --- Call

byte tickets[CALLERS];
bool asked[CALLERS];
mtype task[CALLERS];
bool aborted[CALLERS];    // the task's cancellation was emitted
byte waited[CALLERS];     // how many times it has waited
bool answered[CALLERS];
mtype callback[CALLERS];  // the caller's on_stop
bool stop_requested[CALLERS];

// --- Core and its context

chan queue = [8] of { mtype, byte };
bool context_stopped;
bool services_down;       // Context.destroy_parked has been there
#ifdef LAZY
#define EAGER false
#else
#define EAGER true                     /* the constructor has done Core.start before anybody else has the bridge */
#endif
bool started = EAGER;
bool thread_made = EAGER;
bool joinable = EAGER;    // thread_.joinable()
bool ended = !EAGER;
bool joined = !EAGER;
bool thread_over, abandoned, cancel_asked;
bool mutex;
bool asleep[CLOSERS + 1];  // the closers that sleep in changed_.wait
bool stopped_, cancelling, lingering;  // the worker's own
#ifdef SELF
byte owners = CALLERS + CLOSERS + EAGER + 1;  // of the Core, by shared_ptr
#else
byte owners = CALLERS + CLOSERS + EAGER;      // of the Core, by shared_ptr
#endif

// --- What only the checks look at

bool alive[CALLERS];      // the caller's stack object, or the submitted call on the heap
bool admitted[CALLERS];
bool counted[CALLERS];    // in the gate's word
bool started_task[CALLERS];
bool killed;              // a call was ended by the stop of the worker
bool closed;              // a closer is through with close_to_calls
bool closer_done;
byte inside;              // threads inside asio::post, but for the worker and foreign ones
byte foreign_inside;
bool in_start_memory[CALLERS], in_cancel_memory[CALLERS], in_core_memory, in_linger_memory;

#ifdef MUTANT_closed_looked_at_before_count
byte looked;  // shared: for one caller only
#endif

#define touch(c) assert(alive[c])          /* somebody uses the call */
#define touch_core assert(owners > 0)      /* somebody uses the Core */

// --- Core's owners

inline drop_owner() {
  d_step {
    touch_core;
    owners--;
    if
    :: owners == 0 ->                      // ~Core, ~Context
      assert(inside == 0);
      assert(foreign_inside == 0);
      assert(CALLS(word) == 0 && POSTERS(word) == 0);
      assert(joined && !joinable);         // else ~thread terminates the process
      assert(!thread_made || ended);
    :: else
    fi
  }
}

inline lock() { atomic { !mutex -> mutex = true } }
inline unlock() { mutex = false }
inline notify_all() {  // changed_.notify_all, with the mutex held
  d_step {
    asleep[0] = false;
#if CLOSERS > 1
    asleep[1] = false;
#endif
  }
}

// --- Gate

inline enter(who, closed_bits) {  // Gate.enter: a failed compare-exchange looks again, so the last look decides
#ifdef MUTANT_check_then_count
  ok = !(word & closed_bits);
  if :: ok -> word = word + who :: else fi
#else
  d_step {
    if
    :: word & closed_bits -> ok = false
    :: else -> word = word + who; ok = true
    fi
  }
#endif
}

inline leave() {
#ifdef MUTANT_closed_looked_at_before_leaving
  ok = word & NO_POSTS;
  d_step { touch_core; before = word; word = word - POSTER }
  if :: ok && POSTERS(before) == 1 -> gate_asleep = false :: else fi;
  before = 0;
#else
#ifdef MUTANT_notify_before_leaving
  touch_core;
  if :: (word & NO_POSTS) && POSTERS(word) == 1 -> gate_asleep = false :: else fi;
  word = word - POSTER;
#else
  d_step { touch_core; before = word; word = word - POSTER }     // Gate.leave: fetch_sub(poster)
  if                                                             // Gate.leave: if (no_posts && the last) notify_all()
#ifdef MUTANT_no_notify
  :: false -> skip
#else
  :: (before & NO_POSTS) && POSTERS(before) == 1 -> gate_asleep = false
#endif
  :: else
  fi;
  before = 0
#endif
#endif
}

inline close_gate() {
  d_step { seen = word; word = word | NO_CALLS | NO_POSTS }      // Gate.close: word = fetch_or(no_calls | no_posts)
  do
#ifdef MUTANT_posters_not_awaited
  :: true -> break
#endif
  :: POSTERS(seen) == 0 -> break                                 // Gate.close: posters(word) != 0
  :: else ->
#ifdef MUTANT_sleep_without_look
    gate_asleep = true;
#endif
    d_step { if :: word == seen -> gate_asleep = true :: else fi }  // Gate.close: word_.wait(word)
    !gate_asleep;
    seen = word                                                  // Gate.close: word = word_.load()
  od;
  seen = 0
}

// --- asio::post by a thread that is not the worker

inline post_in(kind, c, in_use) {
  d_step { touch_core; inside++; assert(!in_use && nfull(queue)); in_use = true; queue!kind,c }
  inside--
}

// --- The end of a call

inline answer(c) {
  d_step { assert(!answered[c] && admitted[c]); answered[c] = true }
}

inline end_call(c) {
#ifdef MUTANT_answer_first
  answer(c);
#endif
#ifdef MUTANT_self_reset_first
  if :: IS_DETACHED(c) -> alive[c] = false :: else fi;
#endif
  d_step {
    // One step: who uses the call after the last of these uses a dead one after the first as well.
    touch(c);                                                    // Core.end_call: release_task(), waiter_, std::move(answer_)
    if :: IS_DETACHED(c) -> alive[c] = false :: else fi          // Core.end_call: call.self_ .reset()
  }
#ifdef MUTANT_count_after_answer
  answer(c);
#endif
#ifdef MUTANT_closed_looked_at_before_count
  looked = word & NO_CALLS;
#endif
#ifdef MUTANT_last_call_does_not_stop
  d_step { word = word - CALL; counted[c] = false }
#else
  d_step { touch_core; before = word; word = word - CALL; counted[c] = false }  // Gate.end_call: fetch_sub(call)
#ifdef MUTANT_stop_after_answer
  answer(c);
#endif
#ifdef MUTANT_closed_looked_at_before_count
  before = before - (before & NO_CALLS) + looked;
#endif
  if                                                             // Core.end_call: if (gate_.end_call()) context_.stop()
  :: (before & NO_CALLS) && CALLS(before) == 1 -> touch_core; context_stopped = true
  :: else
  fi;
#endif
  before = 0;
#if !defined(MUTANT_answer_first) && !defined(MUTANT_count_after_answer) && !defined(MUTANT_stop_after_answer)
  answer(c)                                                      // Core.end_call: answer.set_value()
#endif
#ifdef MUTANT_touch_after_answer
  ; touch(c)
#endif
}

inline drop_ticket(c) {
  d_step { touch(c); last = tickets[c] == 1; tickets[c]-- }      // ~Ticket: tickets_.fetch_sub(1) == 1
  if :: last -> last = false; end_call(c) :: else fi             // ~Ticket: core_->end_call(*call_)
}

// --- Core.start, Core.post, Core.cancel, Core.cancel_calls

inline start() {
  if
  :: started                                                     // Core.start: if (started_.load()) return
  :: else ->
#ifdef MUTANT_start_checks_before_lock
    ok = !(word & NO_CALLS);
#else
    ok = true;
#endif
    lock();                                                      // Core.start: lock(mutex_)
    if
#ifdef MUTANT_start_checks_before_lock
    :: started || !ok -> skip
#else
#ifdef MUTANT_start_does_not_check
    :: started -> skip
#else
    :: started || (word & NO_CALLS) -> skip                      // Core.start: if (started_ || closed_to_calls()) return
#endif
#endif
#ifdef NOTHREAD
    :: !started && !(word & NO_CALLS) -> skip                    // Core.start: std::thread throws
    :: !started && !(word & NO_CALLS) ->
#else
    :: else ->
#endif
      assert(!closer_done);
      d_step { owners++; thread_made = true }                    // Core.start: thread_ = std::thread([self = ...])
#ifdef MUTANT_started_before_thread_is_noted
      unlock();
      lock();
#endif
      d_step { joinable = true; ended = false; joined = false }  // Core.start: ended_ = joined_ = false
      started = true                                             // Core.start: started_.store(true)
    fi;
    ok = false;
    unlock()
  fi
}

inline cancel(c) {
  enter(POSTER, NO_POSTS);                                       // Core.cancel: if (!gate_.enter_post()) return
  if
  :: !ok
  :: else ->
#ifdef MUTANT_hold_revives
    d_step { touch(c); tickets[c]++; ok = true }
#else
#ifdef MUTANT_no_hold
    ok = true;
#else
    d_step {                                                     // Core.cancel: if (!call.hold()) return
      touch(c);
      if
      :: tickets[c] == 0 -> ok = false
      :: else -> tickets[c]++; ok = true
      fi
    }
#endif
#endif
    if
    :: !ok
    :: else ->
#ifdef MUTANT_no_ask
      touch(c); asked[c] = true; ok = true;
#else
#ifdef MUTANT_ask_in_two_steps
      d_step { touch(c); ok = !asked[c] }
      asked[c] = true;
#else
      d_step { touch(c); ok = !asked[c]; asked[c] = true }       // Core.cancel: if (!call.ask(why)) return
#endif
#endif
      if
      :: ok ->
        post_in(EMIT, c, in_cancel_memory[c])                    // Core.cancel: post_in(call.cancel_memory_, t = ticket)
#ifdef MUTANT_ticket_not_in_post
        ; drop_ticket(c)
#endif
      :: else ->
#ifdef MUTANT_ticket_outlives_poster
        leave();
        drop_ticket(c);
        left_already = true
#else
#ifndef MUTANT_no_hold
        drop_ticket(c)                                           // Core.cancel: ~Ticket
#else
        skip
#endif
#endif
      fi
    fi;
#ifdef MUTANT_ticket_outlives_poster
    if :: left_already -> left_already = false :: else -> leave() fi;
#else
    leave();                                                     // Core.cancel: ~Poster
#endif
  fi;
  ok = false
}

inline cancel_calls() {
#ifdef MUTANT_cancel_all_twice
  ok = true;
  cancel_asked = true;
#else
  d_step { ok = !cancel_asked; cancel_asked = true }             // Core.cancel_calls: if (cancel_asked_.exchange(true)) return
#endif
  if
  :: !ok
  :: else ->
    enter(POSTER, NO_POSTS);                                     // Core.cancel_calls: if (!gate_.enter_post()) return
    if
    :: !ok
    :: else ->
      post_in(CANCEL_ALL, 0, in_core_memory);                    // Core.cancel_calls: post_in(cancel_memory_, ...)
      leave()                                                    // Core.cancel_calls: ~Poster
    fi
  fi;
  ok = false
}

inline stop() {
#ifdef MUTANT_stop_cuts_settle_short
  context_stopped = true;
#else
  enter(POSTER, NO_POSTS);                                       // Core.stop: if (!gate_.enter_post()) return
  if
  :: !ok
  :: else ->
    touch_core; context_stopped = true;                          // Core.stop: context_.stop()
    leave()                                                      // Core.stop: ~Poster
  fi;
  ok = false
#endif
}

// --- Callers: block_on_until, or submit and detach

active [CALLERS] proctype caller() {
  byte c = _pid;
  byte before;
  bool ok, last, late, sent;
#ifdef MUTANT_ticket_outlives_poster
  bool left_already;
#endif

  d_step {
    alive[c] = true; task[c] = QUEUED; tickets[c] = 1; callback[c] = NONE;
    late = closed
  }
#ifdef MUTANT_no_poster
  enter(CALL, NO_CALLS);
#else
  enter(CALL + POSTER, NO_CALLS);                                // Core.post: if (!gate_.enter_call()) return dead
#endif
  if
  :: !ok -> goto gone
  :: else -> d_step { assert(!late); admitted[c] = true; counted[c] = true }
  fi;
  ok = false;
  start();                                                       // Core.post: start()
#ifdef MUTANT_leave_before_post
  leave();
#endif
  if
  :: !started -> drop_ticket(c)                                  // Core.post: if (!started_) return dead; ~Ticket
#ifdef MUTANT_started_not_checked
  :: !started -> skip
#endif
  :: else ->
    sent = true;
#ifdef MUTANT_sent_without_ticket
    post_in(START, c, in_start_memory[c]);
    drop_ticket(c)
#else
    post_in(START, c, in_start_memory[c])                        // Core.post: post_in(call.start_memory_, t = ticket)
#endif
  fi;
#if !defined(MUTANT_no_poster) && !defined(MUTANT_leave_before_post)
  leave();                                                       // Core.post: ~Poster
#endif
  if
  :: !sent -> goto gone
  :: sent && IS_DETACHED(c) -> goto left                         // ~JoinHandle of a detached handle
  :: else
  fi;

  d_step {                                                       // block_on_until: std::stop_callback on_stop(stop, ...)
    if
    :: stop_requested[c] -> ok = true
    :: else -> callback[c] = REGISTERED
    fi
  }
  if :: ok -> cancel(c) :: else fi;                              // its constructor calls it if a stop was requested
  if
  :: answered[c]                                                 // block_on_until: call.wait_until(deadline)
#ifdef DEADLINE
  :: !answered[c] ->
    cancel(c);                                                   // block_on_until: core->cancel(call, TimedOut)
    answered[c]                                                  // block_on_until: call.wait()
#endif
  fi;
  assert(!counted[c]);                                           // who has seen the answer does not find it in_flight
  assert(tickets[c] == 0 && (task[c] == OVER || !started_task[c]));
#ifdef MUTANT_call_dies_before_callback
  alive[c] = false;
#endif
  atomic {                                                       // block_on_until: ~stop_callback waits for one that runs
    callback[c] != CALLING;
    callback[c] = NONE
  }

gone:
  assert(admitted[c] == answered[c]);                            // exactly the admitted calls are answered
  assert(sent || !started_task[c]);                              // WorkerDead means unrun
  alive[c] = false;                                              // block_on_until: ~WaitedCall
left:
  drop_owner()                                                   // block_on_until: ~shared_ptr<Core>
}

#ifdef STOPPER
active proctype stopper() {
  byte before;
  bool ok, last;
#ifdef MUTANT_ticket_outlives_poster
  bool left_already;
#endif

  atomic {                                                       // std::stop_source::request_stop
    stop_requested[0] = true;
    if
    :: callback[0] == REGISTERED -> callback[0] = CALLING
    :: else -> goto done
    fi
  }
  cancel(0);                                                     // core->cancel(call, Cancelled)
  callback[0] = CALLED;
done:
  skip
}
#endif

// --- What a task waits for elsewhere: it comes back whenever it likes

#ifdef FOREIGN
active [CALLERS] proctype foreign() {
  byte c = _pid % CALLERS;

end:
  do
  :: task[c] == AWAY ->
    foreign_inside++;                                            // it holds the context: an executor with outstanding work
    atomic { touch_core; task[c] = READY; queue!RESUME,c }
    d_step { touch_core; foreign_inside-- }
  od
}
#endif

// --- The worker

inline park(c, state) {  // the task starts an operation and is suspended
  assert(!services_down || state == AWAY);
  d_step { waited[c]++; task[c] = state }
}

inline end_task(c) {
  d_step { touch(c); task[c] = OVER }                            // ~Cancellable: running_ = nullptr, release_task()
  drop_ticket(c)                                                 // drive: its parameter `ticket`, after its locals
}

inline step_task(c) {  // drive: the coroutine goes on, until it waits or is over
  d_step { touch(c); assert(!closer_done) }
  if
  :: true -> end_task(c)
  :: !aborted[c] && waited[c] < STEPS -> park(c, PARKED)
#ifdef FOREVER
  :: !aborted[c] && waited[c] < STEPS -> park(c, LOST)
#endif
#ifdef FOREIGN
  :: !aborted[c] && waited[c] < STEPS -> park(c, AWAY)
#endif
  fi
}

inline emit(c) {  // Core.emit: signal.emit(terminal). An operation on this context completes; a foreign one may not care.
  d_step {
    aborted[c] = true;
    if
    :: task[c] == PARKED || task[c] == LOST -> task[c] = READY; queue!RESUME,c
    :: else
    fi
  }
}

#define RUNNING(c) (task[c] == READY || task[c] == PARKED || task[c] == LOST || task[c] == AWAY)  /* call.running_ */
#define DUE(c) atomic { !context_stopped && task[c] == PARKED -> task[c] = READY; queue!RESUME,c }  /* a timer, a socket */
#define SUSPENDED(c) (task[c] == PARKED || task[c] == LOST)

active proctype worker() {
  mtype kind;
  mtype mode = RUN;
  byte c, i, before, seen;
  bool ok, last, idle, cancelled, was_abandoned, stepped;

end_never_made:
  thread_made;

loop:
  if
  :: mode == RUN ->                                              // Core.run: context_.run()
    if
    :: context_stopped -> goto stopped
    :: !context_stopped && nempty(queue) -> goto take
    :: DUE(0)
#if CALLERS > 1
    :: DUE(1)
#endif
    fi;
    goto loop
  :: mode == ABANDON_STEP ->
    if :: stepped -> mode = ABANDON; goto abandon :: else fi;    // Core.abandon_calls: while (!all_have_stepped)
    context_stopped = false;                                     // Core.abandon_calls: context_.restart()
    if                                                           // Core.abandon_calls: context_.run_one()
    :: context_stopped
    :: !context_stopped && nempty(queue) -> goto take
    :: DUE(0)
#if CALLERS > 1
    :: DUE(1)
#endif
    fi;
    goto loop
  :: mode == ABANDON -> goto abandon
  :: mode == SETTLE -> goto settle
  fi;

take:
  atomic {
    queue?kind,c;
    if                                                           // the handler is moved out of the memory it was in
    :: kind == START -> touch(c); in_start_memory[c] = false
    :: kind == EMIT -> touch(c); in_cancel_memory[c] = false
    :: kind == CANCEL_ALL -> in_core_memory = false
    :: kind == LINGERS -> in_linger_memory = false
    :: else
    fi
  }
  if
  :: kind == START ->                                            // Core.post: the lambda
#ifndef MUTANT_cancelling_not_looked_at
    if :: cancelling && !stopped_ -> asked[c] = true :: else fi; //   if (cancelling_ && !stopped_) ask(Cancelled)
#endif
    if
#ifdef MUTANT_stopped_not_looked_at
    :: !asked[c] ->
#else
    :: !stopped_ && !asked[c] ->                                 //   if (!stopped_ && asked_ == 0) start
#endif
      assert(!stopped_);
      started_task[c] = true;
      task[c] = READY;
#ifdef SELF
      if
      :: c == 0 ->                                               // ~RuntimeBridge on the worker: shut_down(drain, min, last)
        d_step { word = word | NO_CALLS; closed = true };        // Core.shut_down: close_to_calls()
        stop();                                                  // Core.shut_down: stop()
        lock();                                                  // Core.shut_down: !begin_wait; lock(mutex_)
        if :: joinable -> d_step { joinable = false; joined = true } :: else fi;  // Core.shut_down: thread_.detach()
        unlock();
        drop_owner()
      :: else
      fi;
#endif
      step_task(c)
    :: else ->
      if :: !asked[c] -> killed = true :: else fi;
      touch(c);                                                  //   else release_task()
      drop_ticket(c)                                             //   ~Ticket
    fi
  :: kind == EMIT ->                                             // Core.cancel: the lambda
    if :: RUNNING(c) && !stopped_ -> emit(c) :: else fi;         //   if (running && !stopped_) emit(*running)
#if !defined(MUTANT_ticket_not_in_post) && !defined(MUTANT_no_hold)
    drop_ticket(c)                                               //   ~Ticket
#endif
  :: kind == CANCEL_ALL ->                                       // Core.cancel_calls: the lambda
    if
    :: stopped_                                                  //   if (stopped_) return
    :: else ->
      cancelling = true;                                         //   cancelling_ = true
      for (i : 0 .. CALLERS - 1) {                               //   emit_to_all: ask(Cancelled)
        if
        :: RUNNING(i) ->
          d_step { touch(i); ok = !asked[i]; asked[i] = true }
          if :: ok -> emit(i) :: else fi
        :: else
        fi
      }
      i = 0; ok = false
    fi
  :: kind == RESUME -> step_task(c)
  :: kind == STEPPED -> stepped = true                           // Core.abandon_calls: all_have_stepped = true
#ifdef LINGER
  :: kind == LINGERS ->                                          // Core.linger: the lambda
progress_lingers:
    if
    :: stopped_                                                  //   if (stopped_) return
    :: !stopped_ -> in_linger_memory = true; queue!LINGERS,0     //   return linger()
    :: !stopped_ -> lingering = false                            //   lingering_ = false
    fi
#endif
  fi;
#ifdef LINGER
  if                                                             // Core.end_call: if (paid) keep_awake()
  :: kind != LINGERS && !stopped_ && !lingering ->
    atomic { assert(!in_linger_memory); lingering = true; in_linger_memory = true; queue!LINGERS,0 }
  :: true
  fi;
#endif
  d_step { kind = 0; c = 0 }
  goto loop;

stopped:
#ifdef MUTANT_flag_before_close
  stopped_ = true;
  close_gate();
#else
#ifdef MUTANT_abandoned_noted_before_close
  was_abandoned = CALLS(word) != 0;
#endif
#ifndef MUTANT_gate_closed_late
  close_gate();                                                  // Core.run: gate_.close()
#endif
  stopped_ = true;                                               // Core.run: stopped_ = true
#endif
#ifndef MUTANT_abandoned_noted_before_close
  was_abandoned = CALLS(word) != 0;                              // Core.run: abandoned = gate_.in_flight() != 0
#endif
  if :: CALLS(word) == 0 -> goto begin_settle :: else fi;        // Core.abandon_calls: if (in_flight() == 0) return
#ifndef MUTANT_no_step_before_abandon
  queue!STEPPED,0;                                               // Core.abandon_calls: post_in(memory, ...)
  mode = ABANDON_STEP;
  goto loop;
#else
  mode = ABANDON;
#endif

abandon:
  if :: CALLS(word) == 0 -> goto begin_settle :: else fi;        // Core.abandon_calls: for (; in_flight() != 0;)
#ifndef INSIDE_IS_FINE
  assert(inside == 0);                                           // "no thread of ours posts"
#endif
  services_down = true;
  for (i : 0 .. CALLERS - 1) {                                   // Core.abandon_calls: destroy_parked()
    if
    :: SUSPENDED(i) -> killed = true; end_task(i)
    :: else
    fi
  }
  i = 0;
#ifndef MUTANT_no_restart
  context_stopped = false;                                       // Core.abandon_calls: context_.restart()
#endif
#ifndef MUTANT_emit_late
  if
  :: !cancelled ->
    cancelled = true;
    for (i : 0 .. CALLERS - 1) {
      if :: RUNNING(i) -> touch(i); killed = true; emit(i) :: else fi
    }
    i = 0
  :: else
  fi;
#endif
  d_step { idle = context_stopped || empty(queue) }              // Core.abandon_calls: idle = poll_one() == 0
  if
  :: !idle -> goto take
  :: idle && !cancelled ->                                       // Core.abandon_calls: if (!cancelled)
    idle = false;
    cancelled = true;
    for (i : 0 .. CALLERS - 1) {                                 // Core.abandon_calls: emit_to_all(stopped_ = true)
      if :: RUNNING(i) -> touch(i); killed = true; emit(i) :: else fi
    }
    i = 0
#ifndef MUTANT_emit_late
  :: idle && CALLS(word) == 0 -> idle = false                    // without this, run_one would wait for nobody
  :: idle && cancelled && CALLS(word) != 0 ->
#else
  :: idle && cancelled ->                                        // Core.abandon_calls: else if (idle) run_one()
#endif
    idle = false;
#ifdef MUTANT_foreign_not_awaited
    goto begin_settle
#else
    if
    :: context_stopped
    :: !context_stopped && nempty(queue) -> goto take
    fi
#endif
  fi;
  goto abandon;

begin_settle:
  assert(CALLS(word) == 0);
  mode = SETTLE;
#ifdef MUTANT_gate_closed_late
  close_gate();
#endif
#ifndef MUTANT_no_settle
  context_stopped = false;                                       // Core.settle: context_.restart()
  context_stopped || foreign_inside == 0;                        // Core.settle: context_.run_until(end)
#endif

settle:
  if :: nempty(queue) -> goto take :: empty(queue) fi;           // Core.settle: poll_one() until it is 0

#ifdef MUTANT_ended_without_notify
  lock(); ended = true; abandoned = was_abandoned; unlock();
#else
  lock();                                                        // Core.run: lock(mutex_)
  ended = true;                                                  // Core.run: ended_ = true
  abandoned = was_abandoned;                                     // Core.run: abandoned_ = abandoned
  notify_all();                                                  // Core.run: changed_.notify_all()
  unlock();
#endif
  drop_owner();                                                  // Core.start: the thread's `self`
  thread_over = true
}

// --- Closers: shutdown, and the destructor

#ifdef LIMIT
#define MAY_PASS true
#else
#define MAY_PASS false
#endif

inline wait_changed(id) {  // changed_.wait(lock), once: gives the mutex back and sleeps in one step
  d_step { asleep[id] = true; mutex = false }
  atomic { !asleep[id] && !mutex -> mutex = true }
}

inline shut_down(id, how) {
  passed = how == DTOR;
#ifdef MUTANT_in_flight_before_close
  seen = CALLS(word);
#endif
#ifdef MUTANT_cancel_before_close
  if :: how == CANCEL -> cancel_calls() :: else fi;
#endif
#ifndef MUTANT_closed_after_end
  d_step { touch_core; word = word | NO_CALLS; closed = true }   // Core.shut_down: close_to_calls()
#endif
  if :: how == CANCEL -> cancel_calls() :: else fi;              // Core.shut_down: cancel_calls()
  if :: MAY_PASS -> passed = true :: true fi;                    // Core.shut_down: time_left(deadline) == none
#ifndef MUTANT_in_flight_before_close
  seen = CALLS(word);                                            // Core.shut_down: in_flight() == 0
#endif
  if :: seen == 0 || passed -> stop() :: else fi;                // Core.shut_down: stop()
  seen = 0;
  lock();                                                        // Core.shut_down: lock(mutex_)
  do                                                             // Core.shut_down: while (!ended_)
  :: ended -> break
  :: !ended && !passed && MAY_PASS -> passed = true
  :: !ended && passed ->
    stop();                                                      // Core.shut_down: stop(); changed_.wait(ended_)
    do :: ended -> break :: else -> wait_changed(id) od
  :: !ended && !passed ->                                        // Core.shut_down: changed_.wait_for(lock, left)
    d_step { asleep[id] = true; mutex = false }
    if
    :: atomic { !asleep[id] && !mutex -> mutex = true }
    :: atomic { MAY_PASS && !mutex -> mutex = true; asleep[id] = false; passed = true }
    fi
  od;
  passed = false;
#ifdef MUTANT_closed_after_end
  word = word | NO_CALLS; closed = true;
#endif
  if
  :: joinable ->
    joinable = false;                                            // Core.shut_down: thread = std::move(thread_)
    unlock();
    thread_over;                                                 // Core.shut_down: thread.join()
    lock();
    joined = true;                                               // Core.shut_down: joined_ = true
#ifndef MUTANT_joined_without_notify
    notify_all()                                                 // Core.shut_down: changed_.notify_all()
#endif
  :: else ->
#ifndef MUTANT_join_not_awaited
    do :: joined -> break :: else -> wait_changed(id) od         // Core.shut_down: changed_.wait(joined_)
#else
    skip
#endif
  fi;
  assert(!killed || abandoned);                                  // shutdown is true only if no call was cut short
  unlock();
  d_step {
    assert(!thread_made || thread_over);                         // the worker is gone
    assert(!thread_made || CALLS(word) == 0);
    closer_done = true
  }
}

#if CLOSERS > 0
active proctype closer() {
  byte before, seen;
  bool ok, passed;

  if :: HOW0 == STOP -> context_stopped = true :: else fi;       // a user: get_executor().context().stop()
  shut_down(0, HOW0);
  drop_owner()
}
#endif

#if CLOSERS > 1
active proctype closer2() {
  byte before, seen;
  bool ok, passed;

  shut_down(1, HOW1);
  drop_owner()
}
#endif
