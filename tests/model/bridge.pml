// SPDX-License-Identifier: Apache-2.0
//
// A model of include/runtime_bridge.hpp's concurrency: the gate, tickets and answers, cancellation, lazy start, shutdown
// and hard stop. tests/model/run checks every interleaving of it. A step here is one atomic step there. The comment
// beside it names the function that it stands for; a step without a comment belongs to the function named above it.
// Names such as Gate.leave are functions of the header's classes.
//
// Assumptions:
// - Memory is sequentially consistent. The header's relaxed loads are first guesses of a compare-exchange, or hints.
// - asio::post puts a handler at the end of a queue under a lock, and is `inside` the context before and after that.
//   Asio moves a handler out of its memory before it calls it.
// - A task starts inline (co_spawn dispatches) and does not throw. If it heeds cancellation, it ends when what it waits
//   for is aborted, and at the next co_await once it is marked as cancelled.
// - A coroutine whose operation was destroyed is unwound by a handler that Asio posts for it.
// - Timers and sockets that were shut down are ready at once; signals and channels can be waited for again.
// - A destroyed operation stays counted as work of the context, unless it was a channel's.
// - The 200 milliseconds of Core.settle are enough for a foreign thread to let go of the context.
// Not modelled: rings of waiting bridges, fork, raw handlers, coroutines that never wait, foreign executors that
// destroy a task, and the caller's spin, which only looks at the answer; nor Context.remember_operations, as nothing
// depends on the count of work after Core.settle has waited.
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
//   STUBBORN          tasks may ignore cancellation, or try again once after what they wait for was aborted
//   CHANNELS          tasks may wait for a channel that nobody sends to
//   DETACHED          the last caller has submitted and detached its call, and nobody else keeps it
//   LINGER            the worker lingers after a call, for a while
//   SELF              the task of call 0 destroys the bridge
//   STEPS             how many times a task may wait (1)
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
// Core.end_calls: how often tasks are cancelled before anything is destroyed.
#if defined(MUTANT_destroy_without_cancelling)
#define ROUNDS 0
#elif defined(MUTANT_one_round)
#define ROUNDS 1
#elif defined(MUTANT_two_rounds)
#define ROUNDS 2
#else
#define ROUNDS 3
#endif
// The worker's phases after the rounds.
#define DESTROYED 3  /* what is parked, but for what waits for channels */
#define ALL 4        /* that, too */
#define SETTLED 5
#ifdef DETACHED
#define IS_DETACHED(c) ((c) == CALLERS - 1)
#else
#define IS_DETACHED(c) false
#endif

mtype = { DRAIN, CANCEL, DTOR, STOP };                    // what a closer does
mtype = { START, EMIT, CANCEL_ALL, RESUME, UNWIND, PASSED, LINGERS };  // handlers in the queue
// A task: LOST waits for what never comes, CHANNEL for a channel, AWAY for something foreign; DOOMED was destroyed.
mtype = { QUEUED, READY, PARKED, LOST, CHANNEL, AWAY, DOOMED, OVER };
mtype = { NONE, REGISTERED, CALLING, CALLED };            // a std::stop_callback
mtype = { HEEDS, RETRIES, IGNORES };                      // what a task does when it is cancelled
mtype = { RUN, READIES, AWAITS, SETTLES };                // what runs the worker's handlers: Core.run,
                                                          // Core.run_what_is_ready, Core.end_calls, Core.settle
mtype = { CANCELS, ABORTS, MARKS };                       // Core.Emission

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
mtype will[CALLERS];
bool aborted[CALLERS];    // what the task waits for was aborted
bool marked[CALLERS];     // it knows that it is cancelled: each co_await throws
byte waited[CALLERS];     // how many times it has waited
bool answered[CALLERS];
mtype callback[CALLERS];  // the caller's on_stop
bool stop_requested[CALLERS];

// --- Core and its context

chan queue = [8] of { mtype, byte };
bool context_stopped;
bool services_down;       // Context.destroy_parked was called
short work;               // of the context: of foreign threads, and of destroyed operations, minus what was forgotten
byte destroyed;           // tasks, since Core.end_calls marked them
mtype emission = CANCELS;
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
bool was_away[CALLERS];   // the task has waited for something foreign
bool in_start_memory[CALLERS], in_cancel_memory[CALLERS], in_core_memory, in_linger_memory;

#ifdef MUTANT_closed_looked_at_before_count
byte looked;  // shared: for one caller only
#endif

#define OUTSTANDING (len(queue) + work)    /* what Asio counts, while Core.settle has dropped the bridge's own work */
#define touch(c) assert(alive[c])          /* somebody uses the call */
#define touch_core assert(owners > 0)      /* somebody uses the Core */

// --- Owners of the Core

inline drop_owner() {
  d_step {
    touch_core;
    owners--;
    if
    :: owners == 0 ->                      // ~Core
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

inline enter(who, closed_bits) {  // Gate.enter
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
  d_step { touch_core; before = word; word = word - POSTER }     // Gate.leave
  if
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
  d_step { seen = word; word = word | NO_CALLS | NO_POSTS }      // Gate.close
  do
#ifdef MUTANT_posters_not_awaited
  :: true -> break
#endif
  :: POSTERS(seen) == 0 -> break
  :: else ->
#ifdef MUTANT_sleep_without_look
    gate_asleep = true;
#endif
    d_step { if :: word == seen -> gate_asleep = true :: else fi }
    !gate_asleep;
    seen = word
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
    // One step: whatever uses the call after the last of these uses a dead one after the first, too.
    touch(c);                                                    // Core.end_call
    if :: IS_DETACHED(c) -> alive[c] = false :: else fi
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
  d_step { touch_core; before = word; word = word - CALL; counted[c] = false }  // Gate.end_call
#ifdef MUTANT_stop_after_answer
  answer(c);
#endif
#ifdef MUTANT_closed_looked_at_before_count
  before = before - (before & NO_CALLS) + looked;
#endif
  if                                                             // Core.end_call
  :: (before & NO_CALLS) && CALLS(before) == 1 -> touch_core; context_stopped = true
  :: else
  fi;
#endif
  before = 0;
#if !defined(MUTANT_answer_first) && !defined(MUTANT_count_after_answer) && !defined(MUTANT_stop_after_answer)
  answer(c)
#endif
#ifdef MUTANT_touch_after_answer
  ; touch(c)
#endif
}

inline drop_ticket(c) {
  d_step { touch(c); last = tickets[c] == 1; tickets[c]-- }      // ~Ticket
  if :: last -> last = false; end_call(c) :: else fi
}

// --- Core.start, Core.post, Core.cancel, Core.cancel_calls

inline start() {
  if
  :: started                                                     // Core.start
  :: else ->
#ifdef MUTANT_start_checks_before_lock
    ok = !(word & NO_CALLS);
#else
    ok = true;
#endif
    lock();
    if
#ifdef MUTANT_start_checks_before_lock
    :: started || !ok -> skip
#else
#ifdef MUTANT_start_does_not_check
    :: started -> skip
#else
    :: started || (word & NO_CALLS) -> skip
#endif
#endif
#ifdef NOTHREAD
    :: !started && !(word & NO_CALLS) -> skip                    // Core.start: there is no thread to be had
    :: !started && !(word & NO_CALLS) ->
#else
    :: else ->
#endif
      assert(!closer_done);
      d_step { owners++; thread_made = true }
#ifdef MUTANT_started_before_thread_is_noted
      unlock();
      lock();
#endif
      d_step { joinable = true; ended = false; joined = false }
      started = true
    fi;
    ok = false;
    unlock()
  fi
}

inline cancel(c) {
  enter(POSTER, NO_POSTS);                                       // Core.cancel
  if
  :: !ok
  :: else ->
#ifdef MUTANT_hold_revives
    d_step { touch(c); tickets[c]++; ok = true }
#else
#ifdef MUTANT_no_hold
    ok = true;
#else
    d_step {
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
      d_step { touch(c); ok = !asked[c]; asked[c] = true }
#endif
#endif
      if
      :: ok ->
        post_in(EMIT, c, in_cancel_memory[c])
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
        drop_ticket(c)                                           // Core.cancel, ~Ticket
#else
        skip
#endif
#endif
      fi
    fi;
#ifdef MUTANT_ticket_outlives_poster
    if :: left_already -> left_already = false :: else -> leave() fi;
#else
    leave();                                                     // Core.cancel, ~Poster
#endif
  fi;
  ok = false
}

inline cancel_calls() {
#ifdef MUTANT_cancel_all_twice
  ok = true;
  cancel_asked = true;
#else
  d_step { ok = !cancel_asked; cancel_asked = true }             // Core.cancel_calls
#endif
  if
  :: !ok
  :: else ->
    enter(POSTER, NO_POSTS);
    if
    :: !ok
    :: else ->
      post_in(CANCEL_ALL, 0, in_core_memory);
      leave()                                                    // Core.cancel_calls, ~Poster
    fi
  fi;
  ok = false
}

inline stop() {
#ifdef MUTANT_stop_cuts_settle_short
  context_stopped = true;
#else
  enter(POSTER, NO_POSTS);                                       // Core.stop
  if
  :: !ok
  :: else ->
    touch_core; context_stopped = true;
    leave()                                                      // Core.stop, ~Poster
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
  enter(CALL + POSTER, NO_CALLS);                                // Core.post
#endif
  if
  :: !ok -> goto gone
  :: else -> d_step { assert(!late); admitted[c] = true; counted[c] = true }
  fi;
  ok = false;
  start();
#ifdef MUTANT_leave_before_post
  leave();
#endif
  if
  :: !started -> drop_ticket(c)                                  // Core.post, ~Ticket
#ifdef MUTANT_started_not_checked
  :: !started -> skip
#endif
  :: else ->
    sent = true;
#ifdef MUTANT_sent_without_ticket
    post_in(START, c, in_start_memory[c]);
    drop_ticket(c)
#else
    post_in(START, c, in_start_memory[c])
#endif
  fi;
#if !defined(MUTANT_no_poster) && !defined(MUTANT_leave_before_post)
  leave();                                                       // Core.post, ~Poster
#endif
  if
  :: !sent -> goto gone
  :: sent && IS_DETACHED(c) -> goto left                         // ~JoinHandle of a detached handle
  :: else
  fi;

  d_step {                                                       // block_on_until: registers a std::stop_callback
    if
    :: stop_requested[c] -> ok = true
    :: else -> callback[c] = REGISTERED
    fi
  }
  if :: ok -> cancel(c) :: else fi;                              // its constructor calls it if a stop was requested
  if
  :: answered[c]                                                 // Call.wait_until
#ifdef DEADLINE
  :: !answered[c] ->
    cancel(c);                                                   // block_on_until: the deadline has passed
    answered[c]                                                  // Call.wait
#endif
  fi;
  assert(!counted[c]);                                           // a call that was answered is not in_flight
  assert(tickets[c] == 0 && (task[c] == OVER || !started_task[c]));
#ifdef MUTANT_call_dies_before_callback
  alive[c] = false;
#endif
  atomic {                                                       // ~stop_callback waits for one that runs
    callback[c] != CALLING;
    callback[c] = NONE
  }

gone:
  assert(admitted[c] == answered[c]);                            // exactly the admitted calls are answered
  assert(sent || !started_task[c]);                              // WorkerDead means unrun
  alive[c] = false;                                              // ~WaitedCall
left:
  drop_owner()                                                   // block_on_until
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
  cancel(0);                                                     // block_on_until: the stop_callback
  callback[0] = CALLED;
done:
  skip
}
#endif

// --- What a task waits for elsewhere: it comes back at any time

#ifdef FOREIGN
active [CALLERS] proctype foreign() {
  byte c = _pid % CALLERS;

end:
  do
  :: task[c] == AWAY ->
    if
    // The handler of a task that comes back holds work of the context.
    :: d_step { foreign_inside++; work++ }
      atomic { touch_core; task[c] = READY; queue!RESUME,c }
      d_step { touch_core; work--; foreign_inside-- }
    // TaskCall.post_back: who brings back a task that has ended elsewhere owns the Core.
#ifdef MUTANT_brought_back_without_owner
    :: foreign_inside++;
#else
    :: d_step { touch_core; owners++ }
#endif
      atomic { touch_core; task[c] = READY; queue!RESUME,c }
#ifdef MUTANT_brought_back_without_owner
      d_step { touch_core; foreign_inside-- }
#else
      drop_owner()
#endif
    fi
  od
}
#endif

// --- The worker

#define SUSPENDED(c) (task[c] == PARKED || task[c] == LOST || task[c] == CHANNEL)
#define RUNNING(c) (task[c] == READY || task[c] == AWAY || task[c] == DOOMED || SUSPENDED(c))  /* Call.running_ is set */
#define DUE(c) atomic { !context_stopped && !services_down && task[c] == PARKED -> task[c] = READY; queue!RESUME,c }

inline park(c, state) {  // the task starts an operation and is suspended
  // What was cancelled does not get here, and services that are down are of no use.
  assert(!services_down || will[c] == IGNORES);
  d_step {
    waited[c]++;
    was_away[c] = was_away[c] || state == AWAY;
    if
    :: services_down && state == PARKED -> queue!RESUME,c        // a timer or a socket; LOST is a signal
    :: else -> task[c] = state
    fi
  }
}

inline end_task(c) {  // TaskCall.drive, after the task
  d_step {
    touch(c);
#ifdef MUTANT_value_after_destroying
    value = true;
#else
    value = emission != MARKS;                                   // Core.has_destroyed
#endif
    assert(!value || !services_down);                            // what the task says then is worth nothing
    value = false;
    task[c] = OVER                                               // ~Cancellable
  }
  drop_ticket(c)
}

inline unwind_task(c) {  // the frames of a destroyed task go, from the innermost to that of TaskCall.drive
  d_step { touch(c); task[c] = OVER; destroyed++ }               // ~Cancellable
#ifdef MUTANT_answered_before_clear
  drop_ticket(c);
  touch(c)
#else
  touch(c);                                                      // ~Finished: nothing of the task stays in the signal
  drop_ticket(c)
#endif
}

#define MAY_WAIT(c) (waited[c] < STEPS && !marked[c] && !aborted[c])

inline step_task(c) {  // the coroutine goes on, until it waits or is over
  d_step {
    touch(c);
    assert(!closer_done);
    if :: aborted[c] && will[c] == RETRIES -> will[c] = HEEDS; aborted[c] = false :: else fi
  }
  if
  :: true -> end_task(c)
  :: MAY_WAIT(c) -> park(c, PARKED)
#if defined(FOREVER) || defined(STUBBORN)
  :: MAY_WAIT(c) -> park(c, LOST)
#endif
#ifdef CHANNELS
  :: MAY_WAIT(c) -> park(c, CHANNEL)
#endif
#ifdef FOREIGN
  :: MAY_WAIT(c) -> park(c, AWAY)
#endif
  fi
}

inline emit(c, remembers) {  // Core.emit. An operation on this context completes; a foreign one may not care.
  touch(c);
  assert(!services_down);                                        // no cancellation reaches what was destroyed
  if
  :: will[c] == IGNORES
  :: else ->
    if :: remembers -> marked[c] = true :: else fi;              // Remembers
    if                                                           // PassesOn
    :: emission != MARKS && SUSPENDED(c) -> aborted[c] = true; task[c] = READY; queue!RESUME,c
    :: else
    fi
  fi
}

// The gate is closed by now, so the worker has these to itself: one step each.

inline emit_to_tasks(what) {  // Core.end_calls
  d_step {
    emission = what;
    for (i : 0 .. CALLERS - 1) {                                 // Core.emit_to_all
      if :: RUNNING(i) -> killed = true; emit(i, emission == MARKS) :: else fi
    }
    i = 0
  }
}

inline destroy(i) {
  // One that has been away may have come back too late to be cancelled.
  assert(will[i] == IGNORES || was_away[i]);
  touch(i); task[i] = DOOMED; queue!UNWIND,i
}

inline destroy_parked() {  // Context.destroy_parked
  d_step {
    assert(inside == 0);                                         // no thread of ours posts
    services_down = true;
    for (i : 0 .. CALLERS - 1) {
      if :: SUSPENDED(i) && task[i] != CHANNEL -> destroy(i); work++ :: else fi
    }
    i = 0
  }
}

inline destroy_on_channels() {  // Context.destroy_on_channels
  d_step {
    for (i : 0 .. CALLERS - 1) {
      // What was destroyed before may use a channel when it is unwound.
      assert(task[i] != DOOMED || phase == ALL);
      if :: task[i] == CHANNEL -> destroy(i) :: else fi
    }
    i = 0
  }
}

active proctype worker() {
  mtype kind;
  mtype mode = RUN;
  byte c, i, before, seen, phase, count, times;
  bool ok, last, value, was_abandoned, passed, others;

end_never_made:
  thread_made;

loop:
  if
  :: mode == RUN ->                                              // Core.run
    if
    :: context_stopped -> goto stopped
    :: !context_stopped && nempty(queue) -> goto take
    :: DUE(0)                                                    // a timer, a socket
#if CALLERS > 1
    :: DUE(1)
#endif
    fi;
    goto loop
  :: mode == READIES -> goto readies
  :: mode == AWAITS -> goto awaits
  :: mode == SETTLES -> goto settles
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
    fi;
    if
    :: kind == PASSED -> passed = true
    :: kind != PASSED && mode == READIES -> others = true
    :: else
    fi
  }
  if
  :: kind == START ->                                            // Core.post: the handler
#ifndef MUTANT_cancelling_not_looked_at
    if :: cancelling && !stopped_ -> asked[c] = true :: else fi;
#endif
    if
#ifdef MUTANT_stopped_not_looked_at
    :: !asked[c] ->
#else
    :: !stopped_ && !asked[c] ->                                 // TaskCall.start
#endif
      assert(!stopped_);
      started_task[c] = true;
      task[c] = READY;
#ifdef STUBBORN
      if :: will[c] = HEEDS :: c == 0 -> will[c] = RETRIES :: c == 0 -> will[c] = IGNORES fi;
#else
      will[c] = HEEDS;
#endif
#ifdef SELF
      if
      :: c == 0 ->                                               // ~RuntimeBridge, on the worker
        d_step { word = word | NO_CALLS; closed = true };        // Core.shut_down
        stop();
        lock();
        if :: joinable -> d_step { joinable = false; joined = true } :: else fi;
        unlock();
        drop_owner()
      :: else
      fi;
#endif
      step_task(c)
    :: else ->
      if :: !asked[c] -> killed = true :: else fi;
      touch(c);                                                  // TaskCall.release_task
      drop_ticket(c)
    fi
  :: kind == EMIT ->                                             // Core.cancel: the handler
#ifdef MUTANT_cancelled_after_destroying
    d_step { if :: RUNNING(c) -> emit(c, true) :: else fi }
#else
    d_step { if :: RUNNING(c) && emission != MARKS -> emit(c, true) :: else fi }
#endif
#if !defined(MUTANT_ticket_not_in_post) && !defined(MUTANT_no_hold)
    drop_ticket(c)
#endif
  :: kind == CANCEL_ALL ->                                       // Core.cancel_calls: the handler
    if
    :: stopped_
    :: else ->
      cancelling = true;
      for (i : 0 .. CALLERS - 1) {                               // Core.emit_to_all
        if
        :: RUNNING(i) ->
          d_step {
            touch(i);
            if :: !asked[i] -> asked[i] = true; emit(i, true) :: else fi
          }
        :: else
        fi
      }
      i = 0
    fi
  :: kind == RESUME -> step_task(c)
  :: kind == UNWIND -> unwind_task(c)
  :: kind == PASSED                                              // Core.run_what_is_ready: the handler
#ifdef LINGER
  :: kind == LINGERS ->                                          // Core.linger: the handler
progress_lingers:
    if
    :: stopped_
    :: !stopped_ -> in_linger_memory = true; queue!LINGERS,0     // once more
    :: !stopped_ -> lingering = false
    fi
#endif
  fi;
#ifdef LINGER
  if                                                             // Core.keep_awake
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
  close_gate();                                                  // Core.run
#endif
  stopped_ = true;
#endif
#ifndef MUTANT_abandoned_noted_before_close
  was_abandoned = CALLS(word) != 0;
#endif
#ifdef MUTANT_destroy_first
  destroy_parked();
#endif

end_calls:  // Core.end_calls
  if
  :: CALLS(word) == 0 -> goto settle
  :: CALLS(word) != 0 && phase < ROUNDS ->
    emit_to_tasks(ABORTS);
    goto run_what_is_ready
  :: else ->
#if !defined(MUTANT_no_mark) && !defined(MUTANT_marked_after_destroying)
    emit_to_tasks(MARKS);
#endif
    destroyed = 0;
    destroy_parked();
#ifdef MUTANT_marked_after_destroying
    emit_to_tasks(MARKS);
#endif
#ifdef MUTANT_channels_with_the_rest
    destroy_on_channels();
#endif
    phase = DESTROYED
  fi;

run_what_is_ready:  // Core.run_what_is_ready
  mode = READIES;
  d_step { passed = false; others = false; queue!PASSED,0 }

readies:
  if
  :: passed && others -> goto run_what_is_ready
  :: passed && !others ->
    passed = false;
    if
    :: phase < ROUNDS -> phase++; goto end_calls
    :: phase == DESTROYED ->                                     // Core.end_calls
#ifndef MUTANT_channels_counted
      count = destroyed;
#endif
      destroy_on_channels();
      phase = ALL;
      goto run_what_is_ready
    :: phase == ALL ->
#ifdef MUTANT_channels_counted
      count = destroyed;
#endif
      if :: CALLS(word) != 0 -> mode = AWAITS :: else -> goto settle fi;
#ifdef MUTANT_foreign_not_awaited
      goto settle;
#endif
      goto awaits
    :: phase == SETTLED -> goto end_run
    fi
  :: else
  fi;
#ifndef MUTANT_no_restart
  context_stopped = false;                                       // Core.poll_one
#endif
  if
  :: context_stopped -> others = true                            // stopped again, by a user
  :: !context_stopped && nempty(queue) -> goto take
  :: DUE(0)
#if CALLERS > 1
  :: DUE(1)
#endif
  fi;
  goto readies;

awaits:  // Core.end_calls
  if
  :: CALLS(word) == 0 ->
#ifdef MUTANT_counted_with_foreign
    count = destroyed;
#else
    count = 0;
#endif
    goto settle
  :: else
  fi;
  context_stopped = false;                                       // Core.poll_one
  if
  :: !context_stopped && nempty(queue) -> goto take
  :: context_stopped || empty(queue)
  fi;
#ifndef MUTANT_not_destroyed_again
  destroy_parked();
  destroy_on_channels();
#endif
  context_stopped = false;                                       // Core.poll_one
  if
  :: !context_stopped && nempty(queue) -> goto take
  :: context_stopped || empty(queue)
  fi;
  if :: CALLS(word) == 0 -> goto awaits :: else fi;
  if
  :: context_stopped
  :: !context_stopped && nempty(queue) -> goto take
  fi;
  goto awaits;

settle:  // Core.settle
  assert(CALLS(word) == 0);
#ifdef MUTANT_gate_closed_late
  close_gate();
#endif
#ifndef MUTANT_no_settle
  context_stopped = false;
  d_step {                                                       // Context.forget_operations
    do
    :: count != 0 && OUTSTANDING != 0 && !context_stopped -> work--; count--
    :: else -> break
    od;
    count = 0
  }
  mode = SETTLES;

settles:
  if
#ifdef MUTANT_waits_once
  :: context_stopped
#else
  :: context_stopped && times == 2
  :: context_stopped && times < 2 -> times++; context_stopped = false; goto settles
#endif
  :: OUTSTANDING == 0
  :: !context_stopped && OUTSTANDING != 0 && nempty(queue) -> goto take
  :: empty(queue) && foreign_inside == 0                         // 200 milliseconds are over
  fi;
#else
settles:
#endif
  destroy_parked();
  phase = SETTLED;
  goto run_what_is_ready;

end_run:
#ifdef MUTANT_ended_without_notify
  lock(); ended = true; abandoned = was_abandoned; unlock();
#else
  lock();                                                        // Core.run
  ended = true;
  abandoned = was_abandoned;
  notify_all();
  unlock();
#endif
  drop_owner();                                                  // Core.make_worker: the thread co-owns the Core
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
  d_step { touch_core; word = word | NO_CALLS; closed = true }   // Core.shut_down
#endif
  if :: how == CANCEL -> cancel_calls() :: else fi;
  if :: MAY_PASS -> passed = true :: true fi;
#ifndef MUTANT_in_flight_before_close
  seen = CALLS(word);
#endif
  if :: seen == 0 || passed -> stop() :: else fi;
  seen = 0;
  lock();
  do
  :: ended -> break
  :: !ended && !passed && MAY_PASS -> passed = true
  :: !ended && passed ->
    stop();
    do :: ended -> break :: else -> wait_changed(id) od
  :: !ended && !passed ->
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
    joinable = false;
    unlock();
    thread_over;
    lock();
    joined = true;
#ifndef MUTANT_joined_without_notify
    notify_all()
#endif
  :: else ->
#ifndef MUTANT_join_not_awaited
    do :: joined -> break :: else -> wait_changed(id) od
#else
    skip
#endif
  fi;
  assert(!killed || abandoned);                                  // shutdown is true only if no call was cut off
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
