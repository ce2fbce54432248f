// SPDX-License-Identifier: Apache-2.0
//
// A model of the concurrency in include/runtime_bridge.hpp: how calls are admitted, sent, cancelled and completed, and
// how the worker starts and ends. tests/model/run checks all of its interleavings. One step of the model is one atomic
// step of the header. The comment beside a step names the function that it stands for, such as Gate::close. A step
// without such a comment belongs to the function named above it. tests/model/run checks that these names exist.
//
// Assumptions:
// - Memory is sequentially consistent. The header's relaxed loads only give the first value for a compare-exchange, or
//   a hint.
// - asio::post appends a handler to a queue under a lock. The posting thread also uses the context just before and just
//   after that. Asio moves a handler out of its memory before it calls the handler.
// - A task starts inline, since co_spawn dispatches. A task throws only after it was cancelled. A task that heeds
//   cancellation ends when the operation that it waits for is aborted, and at its next co_await once it is marked.
// - If the operation of a coroutine is destroyed, a handler that Asio posts unwinds the coroutine.
// - After their services are shut down, timers and sockets are ready at once. Signals and channels still wait.
// - A destroyed operation still counts as work of the context, unless it was an operation on a channel.
// - A foreign thread lets go of the context within the 200 milliseconds of Context::destroy_leftovers.
//
// Not modelled: which waits close a ring (a refusal is a free choice here), fork, raw handlers, coroutines that never
// wait, foreign executors that destroy a task, and SpinPolicy::spin, which only reads whether the call is completed.
// Context::destroy_leftovers adds the work back that it has subtracted. This is not modelled either, since nothing
// depends on the count of work after the wait.
//
// Macros select a configuration:
//   CALLERS, CLOSERS  how many threads of each kind. Each caller makes one call, which has the caller's number
//   HOW0, HOW1        what each closer does: DRAIN, CANCEL, DTOR (destroys the bridge), or STOP (stops the context
//                     itself, as a user can, and then drains)
//   LIMIT             each shutdown has a limit, which may pass at any moment
//   LAZY              Start::lazy
//   NOTHREAD          std::thread may fail
//   REFUSED           the wait for a call may close a ring: the call is refused with WouldDeadlock
//   DEADLINE          each call has a deadline, which may pass at any moment
//   STOPPER           a thread requests a stop of call 0, at any moment
//   HANDLES           calls are submitted. The handle may cancel its call at any moment, even a call that was refused
//   DETACHED          the last caller has submitted its call and detached the handle
//   FOREVER           tasks may wait for an operation on this context that never completes
//   FOREIGN           tasks may wait for something foreign
//   STUBBORN          tasks may ignore cancellation, or wait once more after an operation was aborted
//   CHANNELS          tasks may wait for a channel that nobody sends to
//   POLLING           the worker polls for a while after a call
//   SELF              the task of call 0 destroys the bridge
//   STEPS             how many times a task may wait (1)
//   MUTANT_name       a mistake. tests/model/run lists them

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
// Worker::end_calls: how often it cancels the tasks before it destroys anything.
#if defined(MUTANT_destroy_without_cancelling)
#define ROUNDS 0
#elif defined(MUTANT_one_round)
#define ROUNDS 1
#elif defined(MUTANT_two_rounds)
#define ROUNDS 2
#else
#define ROUNDS 3
#endif
// The phases of the end of the worker, after the rounds.
#define PARKED_DESTROYED 3    /* operations were destroyed, except those on channels */
#define CHANNELS_DESTROYED 4  /* operations on channels were destroyed, too */
#define LEFTOVERS_DESTROYED 5
#ifdef DETACHED
#define IS_DETACHED(c) ((c) == CALLERS - 1)
#else
#define IS_DETACHED(c) false
#endif

mtype = { DRAIN, CANCEL, DTOR, STOP };                        // what a closer does
mtype = { BEGIN, EMIT, CANCEL_ALL, RESUME, UNWIND, PASSED, POLL };  // handlers in the queue
// A task. PARKED waits for a timer or a socket, NEVER for an operation that never completes, CHANNEL for a channel,
// AWAY for something foreign. The operation of a task that is DESTROYED was destroyed; the task is still to be unwound.
mtype = { QUEUED, READY, PARKED, NEVER, CHANNEL, AWAY, DESTROYED, OVER };
mtype = { VALUE, THREW, ASKED, LOST };                        // an outcome. ASKED: cancelled or timed out
mtype = { NONE, REGISTERED, CALLING, CALLED };                // a std::stop_callback
mtype = { HEEDS, RETRIES, IGNORES };                          // what a task does when it is cancelled
mtype = { IN_RUN, IN_ROUND, IN_END_CALLS, IN_LEFTOVERS };     // what runs the worker's handlers: Worker::run,
                                                              // Context::run_ready_handlers, Worker::end_calls,
                                                              // Context::destroy_leftovers
mtype = { CANCELS, ABORTS, MARKS };                           // Emission
mtype = { OPEN, CANCELLING, STOPPED };                        // Worker::Mode

// --- Gate: one word

#define NO_CALLS 1
#define NO_POSTS 2
#define POSTER 4
#define CALL 32
#define POSTERS(w) (((w) % CALL) / POSTER)
#define CALLS(w) ((w) / CALL)

byte word;
bool gate_asleep;  // a thread sleeps in Gate::close

// --- Call

byte references[CALLERS];
bool asked[CALLERS];
mtype outcome[CALLERS];
bool completed[CALLERS];
mtype task[CALLERS];
mtype will[CALLERS];
bool aborted[CALLERS];    // the operation that the task waits for was aborted
bool marked[CALLERS];     // the task is marked as cancelled: each co_await throws
byte waited[CALLERS];     // how many times the task has waited
mtype callback[CALLERS];  // the caller's stop callback in Worker::block
bool stop_requested[CALLERS];

// --- Worker and its context

chan queue = [8] of { mtype, byte };
bool context_stopped;
bool services_down;       // Context::destroy_parked was called
short work;               // what Asio counts, except handlers: foreign threads and destroyed operations
byte destroyed;           // tasks that were destroyed instead of ending: CancelSignals::destroyed
mtype emission = CANCELS;
mtype mode = OPEN;
bool polling;
#ifdef LAZY
#define EAGER false
#else
#define EAGER true                     /* the constructor has called Worker::start before another thread has the bridge */
#endif
bool started = EAGER;
bool joinable = EAGER;
bool ended = !EAGER;
bool joined = !EAGER;
bool cut_off, cancel_asked;
bool mutex;
bool asleep[CLOSERS + 1];  // the closers that wait for changes in Worker::shut_down
#ifdef SELF
byte owners = CALLERS + CLOSERS + EAGER + 1;  // of the Worker, by shared_ptr
#else
byte owners = CALLERS + CLOSERS + EAGER;      // of the Worker, by shared_ptr
#endif

// --- What only the assertions read

bool alive[CALLERS];      // the call exists
bool sent[CALLERS];
bool counted[CALLERS];    // the gate counts the call
bool started_task[CALLERS];
bool lost;                // the stop of the worker has reached a call
bool closed;              // a closer has called Gate::close_to_calls
bool closer_done;
bool thread_made = EAGER;
bool thread_over;
byte inside;              // threads inside asio::post, except the worker and foreign threads
byte foreign_inside;      // foreign threads inside asio::post
bool was_away[CALLERS];   // the task has waited for something foreign
bool in_start_memory[CALLERS], in_cancel_memory[CALLERS], in_worker_memory, in_spin_memory;

#ifdef MUTANT_closed_looked_at_before_count
byte looked;  // shared: for one caller only
#endif

#define WORK (len(queue) + work)           /* what Asio counts in Context::destroy_leftovers */
#define touch(c) assert(alive[c])          /* a thread uses the call */
#define touch_worker assert(owners > 0)    /* a thread uses the Worker */

// --- Owners of the Worker

inline drop_owner() {
  d_step {
    touch_worker;
    owners--;
    if
    :: owners == 0 ->                                            // ~Worker
      assert(inside == 0);
      assert(foreign_inside == 0);
      assert(CALLS(word) == 0 && POSTERS(word) == 0);
      assert(joined && !joinable);                               // else ~thread terminates the process
      assert(!thread_made || ended);
      assert(sent[0] == completed[0] && sent[CALLERS - 1] == completed[CALLERS - 1]);
    :: else
    fi
  }
}

inline lock() { atomic { !mutex -> mutex = true } }
inline unlock() { mutex = false }
inline notify_all() {  // with the mutex held
  d_step {
    asleep[0] = false;
#if CLOSERS > 1
    asleep[1] = false;
#endif
  }
}

// --- Gate

inline enter(counts, closed_bits) {  // Gate::enter
#ifdef MUTANT_check_then_count
  ok = !(word & closed_bits);
  if :: ok -> word = word + counts :: else fi
#else
  d_step {
    if
    :: word & closed_bits -> ok = false
    :: else -> word = word + counts; ok = true
    fi
  }
#endif
}

inline end_post() {
#ifdef MUTANT_closed_looked_at_before_leaving
  ok = word & NO_POSTS;
  d_step { touch_worker; before = word; word = word - POSTER }
  if :: ok && POSTERS(before) == 1 -> gate_asleep = false :: else fi;
  before = 0;
#else
#ifdef MUTANT_notify_before_leaving
  touch_worker;
  if :: (word & NO_POSTS) && POSTERS(word) == 1 -> gate_asleep = false :: else fi;
  word = word - POSTER;
#else
  d_step { touch_worker; before = word; word = word - POSTER }   // Gate::end_post
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

inline end_call(c, stops) {
  d_step {
    touch_worker;
    assert(counted[c] && CALLS(word) > 0);
    before = word; word = word - CALL; counted[c] = false        // Gate::end_call
  }
#ifdef MUTANT_stop_after_completion
  set_completed(c);
#endif
#ifdef MUTANT_closed_looked_at_before_count
  before = before - (before & NO_CALLS) + looked;
#endif
  if
  :: stops && (before & NO_CALLS) && CALLS(before) == 1 -> touch_worker; context_stopped = true
  :: else
  fi;
  before = 0
}

inline close_gate() {
  d_step { seen = word; word = word | NO_CALLS | NO_POSTS }      // Gate::close
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

inline append(kind, c, in_use) {
  d_step { touch_worker; inside++; assert(!in_use && nfull(queue)); in_use = true; queue!kind,c }
}

inline post(kind, c, in_use) {  // Context::post
  append(kind, c, in_use);
  inside--
}

// --- The end of a call. `on_stopped` tells that this thread is the worker, and that the worker is being stopped

inline forget(c) {  // nothing reads this any more: without it there are fewer states
  asked[c] = false; outcome[c] = 0; task[c] = OVER; will[c] = 0; aborted[c] = false; marked[c] = false; waited[c] = 0;
  was_away[c] = false; started_task[c] = false
}

inline set_completed(c) {
  d_step {
    assert(!completed[c] && sent[c]);
    completed[c] = true;
    if :: IS_DETACHED(c) -> forget(c) :: else fi
  }
}

inline set_threw(c) {  // Call::set_threw, on the worker
  if
  :: mode == STOPPED -> outcome[c] = LOST
  :: mode != STOPPED && asked[c] -> outcome[c] = ASKED
  :: else -> outcome[c] = THREW
  fi
}

inline write_outcome(c, on_stopped) {  // Call::end
  if
  :: outcome[c] == 0 && task[c] == QUEUED && asked[c] -> outcome[c] = ASKED
  :: outcome[c] == 0 && !(task[c] == QUEUED && asked[c]) ->
    assert(on_stopped);                                          // no call is lost unless the worker is stopped
    outcome[c] = LOST
  :: else
  fi
}

inline complete(c, on_stopped) {
#ifdef MUTANT_completed_first
  set_completed(c);
#endif
#ifdef MUTANT_self_reset_first
  if :: IS_DETACHED(c) -> alive[c] = false :: else fi;
#endif
  d_step {
    // One step: what uses a dead call after the last of these does so after the first of them, too.
    touch(c);                                                    // Worker::complete
#ifndef MUTANT_outcome_after_completion
    write_outcome(c, on_stopped);
#endif
    if :: IS_DETACHED(c) -> alive[c] = false :: else fi          // Call::take_completion
  }
#ifdef MUTANT_count_after_completion
  set_completed(c);
#endif
#ifdef MUTANT_closed_looked_at_before_count
  looked = word & NO_CALLS;
#endif
#ifdef MUTANT_last_call_does_not_stop
  end_call(c, false);
#else
  end_call(c, true);
#endif
#if !defined(MUTANT_completed_first) && !defined(MUTANT_count_after_completion) && !defined(MUTANT_stop_after_completion)
  set_completed(c)                                               // Worker::complete
#endif
#ifdef MUTANT_outcome_after_completion
  ; d_step { write_outcome(c, on_stopped) }
#endif
#ifdef MUTANT_touch_after_completion
  ; touch(c)
#endif
}

inline drop_reference(c, on_stopped) {
  d_step { touch(c); last = references[c] == 1; references[c]-- }  // ~CallRef
  if :: last -> last = false; complete(c, on_stopped) :: else fi
}

// --- The functions of Worker that other threads call

inline start() {
  if
  :: started                                                     // Worker::start
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
    :: !started && !(word & NO_CALLS) -> failed = true           // Worker::start throws
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
  enter(POSTER, NO_POSTS);                                       // Worker::cancel, Gate::admit_post
  if
  :: !ok
  :: else ->
#ifdef MUTANT_reference_revives
    d_step { touch(c); references[c]++; ok = true }
#else
#ifdef MUTANT_cancel_without_reference
    ok = true;
#else
    d_step {                                                     // Call::reference
      touch(c);
      if
      :: references[c] == 0 -> ok = false
      :: else -> references[c]++; ok = true
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
      d_step { touch(c); ok = !asked[c]; asked[c] = true }       // Call::ask
#endif
#endif
      if
      :: ok ->
        post(EMIT, c, in_cancel_memory[c])
#ifdef MUTANT_reference_not_in_handler
        ; drop_reference(c, false)
#endif
      :: else ->
#ifdef MUTANT_reference_outlives_poster
        end_post();
        drop_reference(c, false);
        left_already = true
#else
#ifndef MUTANT_cancel_without_reference
        drop_reference(c, false)                                 // Worker::cancel, ~CallRef
#else
        skip
#endif
#endif
      fi
    fi;
#ifdef MUTANT_reference_outlives_poster
    if :: left_already -> left_already = false :: else -> end_post() fi;
#else
    end_post();                                                  // Worker::cancel, ~Admission
#endif
  fi;
  ok = false
}

inline cancel_all() {
#ifdef MUTANT_cancel_all_twice
  ok = true;
  cancel_asked = true;
#else
  d_step { ok = !cancel_asked; cancel_asked = true }             // Worker::cancel_all
#endif
  if
  :: !ok
  :: else ->
    enter(POSTER, NO_POSTS);
    if
    :: !ok
    :: else ->
      post(CANCEL_ALL, 0, in_worker_memory);
      end_post()                                                 // Worker::cancel_all, ~Admission
    fi
  fi;
  ok = false
}

inline stop() {
#ifdef MUTANT_stop_cuts_leftovers_short
  context_stopped = true;
#else
  enter(POSTER, NO_POSTS);                                       // Worker::stop
  if
  :: !ok
  :: else ->
    touch_worker; context_stopped = true;
    end_post()                                                   // Worker::stop, ~Admission
  fi;
  ok = false
#endif
}

// --- Callers: RuntimeBridge::block_on_until, or RuntimeBridge::submit

active [CALLERS] proctype caller() {
  byte c = _pid;
  byte before;
  bool ok, last, late, failed;
#ifdef MUTANT_reference_outlives_poster
  bool left_already;
#endif

  d_step {
    alive[c] = true; task[c] = QUEUED; callback[c] = NONE;
#ifdef MUTANT_reference_before_send
    references[c] = 1;
#endif
    late = closed
  }
#ifndef MUTANT_start_after_admission
#ifdef LAZY
  start();                                                       // Worker::send
#endif
#endif
#ifndef MUTANT_start_failure_ignored
  if :: failed -> goto refused :: else fi;
#endif
#ifdef MUTANT_no_poster
  enter(CALL, NO_CALLS);
#else
  enter(CALL + POSTER, NO_CALLS);                                // Gate::admit_call
#endif
  if
  :: !ok -> goto refused
  :: else -> d_step { assert(!late); counted[c] = true; ok = false; failed = false }
  fi;
#ifdef MUTANT_start_after_admission
  start();
#endif
#ifdef REFUSED
  if
  :: !IS_DETACHED(c) ->                                          // WaitNode::begin_wait finds a ring
#ifdef MUTANT_refused_call_uncounted_last
    end_post();
    end_call(c, true);
#else
#ifndef MUTANT_refused_call_stays_counted
#ifdef MUTANT_refused_call_does_not_stop
    end_call(c, false);
#else
    end_call(c, true);                                           // Worker::send, ~Admission
#endif
#endif
    end_post();
#endif
    goto refused
  :: true                                                        // no ring, or nobody waits
  fi;
#endif
#ifdef MUTANT_leave_before_post
  end_post();
#endif
  atomic {
    assert(started);                                             // there is a worker for the call
    sent[c] = true; references[c] = 1;                           // Call::send_to
    append(BEGIN, c, in_start_memory[c])                         // Context::post
  }
  inside--;
#ifdef MUTANT_posted_without_reference
  drop_reference(c, false);
#endif
#ifdef MUTANT_sent_call_uncounted
  end_call(c, true);
#endif
#if !defined(MUTANT_no_poster) && !defined(MUTANT_leave_before_post)
  end_post();                                                    // Worker::send, ~Admission
#endif
  if
  :: IS_DETACHED(c) -> goto left                                 // JoinHandle::detach
  :: else
  fi;

  d_step {                                                       // Worker::block registers a std::stop_callback
    if
    :: stop_requested[c] -> ok = true
    :: else -> callback[c] = REGISTERED
    fi
  }
  if :: ok -> cancel(c) :: else fi;                              // its constructor calls it if a stop was requested
  if
  :: completed[c]                                                // Call::wait_until, JoinHandle::join
#if defined(DEADLINE) || defined(HANDLES)
  :: !completed[c] ->
    cancel(c);                                                   // Worker::block, JoinHandle::stop_and_wait
    completed[c]                                                 // Call::wait
#endif
  fi;
  d_step {
    assert(!counted[c]);                                         // RuntimeBridge::in_flight does not count it any more
    assert(references[c] == 0 && (task[c] == OVER || !started_task[c]));
    assert(outcome[c] != 0);
    assert(outcome[c] != ASKED || asked[c]);
    assert(outcome[c] != LOST || lost);
    assert(outcome[c] != VALUE || started_task[c])
  }
#ifdef MUTANT_call_dies_before_callback
  alive[c] = false;
#endif
  atomic {                                                       // ~stop_callback waits for a callback that runs
    callback[c] != CALLING;
    callback[c] = NONE
  }
  goto gone;

refused:
#ifdef HANDLES
  // Call::refuse has completed the call. Its handle is destroyed before anybody joins it.
  if :: !IS_DETACHED(c) -> cancel(c) :: else fi;                 // JoinHandle::stop_and_wait
#endif
  assert(!started_task[c] && !completed[c] && !counted[c]);      // a call that was refused has not run

gone:
  atomic { forget(c); alive[c] = false }                         // ~Call
left:
  drop_owner()
}

#ifdef STOPPER
active proctype stopper() {
  byte before;
  bool ok, last;
#ifdef MUTANT_reference_outlives_poster
  bool left_already;
#endif

  atomic {                                                       // std::stop_source::request_stop
    stop_requested[0] = true;
    if
    :: callback[0] == REGISTERED -> callback[0] = CALLING
    :: else -> goto done
    fi
  }
  cancel(0);                                                     // Worker::block: the stop callback
  callback[0] = CALLED;
done:
  skip
}
#endif

// --- What a task waits for elsewhere: it comes back at any time

#ifdef FOREIGN
active [CALLERS] proctype foreign() {
  byte c = _pid % CALLERS;

end_foreign:
  do
  :: task[c] == AWAY ->
    if
    // The handler of a task that comes back holds work of the context.
    :: d_step { foreign_inside++; work++ }
      atomic { touch_worker; task[c] = READY; queue!RESUME,c }
      d_step { touch_worker; work--; foreign_inside-- }
    // PostToWorker: the thread on which a task has ended posts it back, and owns the Worker meanwhile.
#ifdef MUTANT_brought_back_without_owner
    :: foreign_inside++;
#else
    :: d_step { touch_worker; owners++ }
#endif
      atomic { touch_worker; task[c] = READY; queue!RESUME,c }
#ifdef MUTANT_brought_back_without_owner
      d_step { touch_worker; foreign_inside-- }
#else
      drop_owner()
#endif
    fi
  od
}
#endif

// --- The worker

#define SUSPENDED(c) (task[c] == PARKED || task[c] == NEVER || task[c] == CHANNEL)
#define RUNNING(c) (task[c] == READY || task[c] == AWAY || task[c] == DESTROYED || SUSPENDED(c))  /* RunningTask */
#define DUE(c) atomic { !context_stopped && !services_down && task[c] == PARKED -> task[c] = READY; queue!RESUME,c }

inline park(c, state) {  // the task starts an operation and is suspended
  // A cancelled task does not get here. Nor does any task use services that are shut down, unless it ignores all.
  assert(!services_down || will[c] == IGNORES);
  d_step {
    waited[c]++;
    was_away[c] = was_away[c] || state == AWAY;
    if
    :: services_down && state == PARKED -> queue!RESUME,c        // ready at once
    :: else -> task[c] = state
    fi
  }
}

inline end_task(c) {  // drive, after the task
  if
  :: true -> d_step {                                            // the task returns
      touch(c);
#ifdef MUTANT_value_after_destroying
      outcome[c] = VALUE;
#else
      if :: emission != MARKS -> outcome[c] = VALUE :: else fi;  // Worker::has_destroyed
#endif
      assert(outcome[c] != VALUE || !services_down);             // a value that is made then is worth nothing
      task[c] = OVER                                             // ~RunningTask
    }
  :: aborted[c] || marked[c] -> d_step {                         // the task throws
      touch(c);
      set_threw(c);
      task[c] = OVER                                             // ~RunningTask
    }
  fi;
  drop_reference(c, mode == STOPPED)
}

inline unwind_task(c) {  // the frames of a destroyed task are destroyed, from the innermost to that of drive
  d_step { touch(c); task[c] = OVER; destroyed++ }               // ~RunningTask
#ifdef MUTANT_completed_before_clear
  drop_reference(c, mode == STOPPED);
  touch(c)
#else
  touch(c);                                                      // CancelSignals::give_back clears the slot
  drop_reference(c, mode == STOPPED)
#endif
}

#define MAY_WAIT(c) (waited[c] < STEPS && !marked[c] && !aborted[c])

inline step_task(c) {  // the coroutine runs until it waits or is over
  d_step {
    touch(c);
    assert(!closer_done);
    if :: aborted[c] && will[c] == RETRIES -> will[c] = HEEDS; aborted[c] = false :: else fi
  }
  if
  :: true -> end_task(c)
  :: MAY_WAIT(c) -> park(c, PARKED)
#if defined(FOREVER) || defined(STUBBORN)
  :: MAY_WAIT(c) -> park(c, NEVER)
#endif
#ifdef CHANNELS
  :: MAY_WAIT(c) -> park(c, CHANNEL)
#endif
#ifdef FOREIGN
  :: MAY_WAIT(c) -> park(c, AWAY)
#endif
  fi
}

inline emit(c, marks) {  // CancelSignals::emit. An operation on this context completes. A foreign one may not care.
  touch(c);
  assert(!services_down);                                        // no cancellation reaches what was destroyed
  if
  :: will[c] == IGNORES
  :: else ->
    if :: marks -> marked[c] = true :: else fi;                  // MarksTask
    if                                                           // AbortsOperation
    :: emission != MARKS && SUSPENDED(c) -> aborted[c] = true; task[c] = READY; queue!RESUME,c
    :: else
    fi
  fi
}

inline set_mode(to) {
  d_step { assert(mode != STOPPED); mode = to }                  // it only moves forward
}

// After the gate is closed, the worker alone uses these. So each is one step.

inline emit_to_tasks(what) {  // Worker::end_calls
  d_step {
    emission = what;
    for (i : 0 .. CALLERS - 1) {                                 // CancelSignals::emit_to_all
      if :: RUNNING(i) -> lost = true; emit(i, emission == MARKS) :: else fi
    }
    i = 0
  }
}

inline destroy(i) {
  // A task that heeds cancellation is destroyed only if it has waited elsewhere, and came back too late.
  assert(will[i] == IGNORES || was_away[i]);
  touch(i); task[i] = DESTROYED; queue!UNWIND,i
}

inline destroy_parked() {  // Context::destroy_parked
  d_step {
    assert(inside == 0);                                         // no thread of ours posts
    services_down = true;
    for (i : 0 .. CALLERS - 1) {
      if :: SUSPENDED(i) && task[i] != CHANNEL -> destroy(i); work++ :: else fi
    }
    i = 0
  }
}

inline destroy_on_channels() {  // Context::destroy_on_channels
  d_step {
    for (i : 0 .. CALLERS - 1) {
      assert(task[i] != DESTROYED);                              // it may use a channel when it is unwound
      if :: task[i] == CHANNEL -> destroy(i) :: else fi
    }
    i = 0
  }
}

inline run_ready_handler() {  // Context::run_ready_handler
  context_stopped = false;
  if
  :: !context_stopped && nempty(queue) -> goto take
  :: context_stopped || empty(queue)
  fi
}

active proctype worker() {
  mtype kind;
  mtype where = IN_RUN;
  byte c, i, before, seen, phase, count, times;
  bool ok, last, cut, passed, others;

end_never_made:
  thread_made;

loop:
  if
  :: where == IN_RUN ->                                          // Worker::run
    if
    :: context_stopped -> goto stopped
    :: !context_stopped && nempty(queue) -> goto take
    :: DUE(0)                                                    // a timer, a socket
#if CALLERS > 1
    :: DUE(1)
#endif
    fi;
    goto loop
  :: where == IN_ROUND -> goto in_round
  :: where == IN_END_CALLS -> goto wait_for_foreign
  :: where == IN_LEFTOVERS -> goto in_leftovers
  fi;

take:
  atomic {
    queue?kind,c;
    if                                                           // Asio moves the handler out of its memory
    :: kind == BEGIN -> touch(c); in_start_memory[c] = false
    :: kind == EMIT -> touch(c); in_cancel_memory[c] = false
    :: kind == CANCEL_ALL -> in_worker_memory = false
    :: kind == POLL -> in_spin_memory = false
    :: else
    fi;
    if
    :: kind == PASSED -> passed = true
    :: kind != PASSED && where == IN_ROUND -> others = true
    :: else
    fi
  }
  if
  :: kind == BEGIN ->                                            // Worker::begin
#ifndef MUTANT_cancelling_not_looked_at
    if :: mode == CANCELLING -> asked[c] = true :: else fi;
#endif
    if
#ifdef MUTANT_stopped_not_looked_at
    :: !asked[c] ->
#else
    :: mode != STOPPED && !asked[c] ->                           // Call::start
#endif
      assert(mode != STOPPED);
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
        d_step { word = word | NO_CALLS; closed = true };        // Worker::shut_down
        stop();
        lock();                                                  // Worker::detach
        if :: joinable -> d_step { joinable = false; joined = true } :: else fi;
        unlock();
        drop_owner()
      :: else
      fi;
#endif
      step_task(c)
    :: else ->
      if :: !asked[c] -> lost = true :: else fi;
      touch(c);                                                  // Call::release_task
      drop_reference(c, mode == STOPPED)
    fi
  :: kind == EMIT ->                                             // Worker::cancel: the handler
    d_step { if :: RUNNING(c) -> assert(emission != MARKS); emit(c, true) :: else fi }  // CancelSignals::cancel
#if !defined(MUTANT_reference_not_in_handler) && !defined(MUTANT_cancel_without_reference)
    drop_reference(c, mode == STOPPED)
#endif
  :: kind == CANCEL_ALL ->                                       // Worker::cancel_all: the handler
    if
#ifdef MUTANT_mode_goes_back
    :: false
#else
    :: mode == STOPPED
#endif
    :: else ->
#ifdef MUTANT_mode_goes_back
      mode = CANCELLING;
#else
      set_mode(CANCELLING);
#endif
      for (i : 0 .. CALLERS - 1) {                               // CancelSignals::emit_to_all
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
  :: kind == PASSED                                              // Context::run_ready_handlers: the handler
#ifdef POLLING
  :: kind == POLL ->                                             // SpinPolicy::poll: the handler
progress_polls:
    if
    :: mode == STOPPED
    :: mode != STOPPED -> in_spin_memory = true; queue!POLL,0    // once more
    :: mode != STOPPED -> polling = false
    fi
#endif
  fi;
#ifdef POLLING
  if                                                             // SpinPolicy::stay_awake
  :: kind != POLL && mode != STOPPED && !polling ->
    atomic { assert(!in_spin_memory); polling = true; in_spin_memory = true; queue!POLL,0 }
  :: true
  fi;
#endif
  d_step { kind = 0; c = 0 }
  goto loop;

stopped:
#ifdef MUTANT_mode_before_close
  set_mode(STOPPED);
  close_gate();
#else
#ifdef MUTANT_cut_off_noted_before_close
  cut = CALLS(word) != 0;
#endif
#ifndef MUTANT_gate_closed_late
  close_gate();                                                  // Worker::run
#endif
  set_mode(STOPPED);
#endif
#ifndef MUTANT_cut_off_noted_before_close
  d_step {
    cut = CALLS(word) != 0;
    // A call that was refused is not counted here: it would make Worker::shut_down return false.
    assert(!cut || (sent[0] && counted[0]) || (sent[CALLERS - 1] && counted[CALLERS - 1]))
  }
#endif
#ifdef MUTANT_destroy_first
  destroy_parked();
#endif

end_calls:  // Worker::end_calls
  if
  :: CALLS(word) == 0 -> goto leftovers
  :: CALLS(word) != 0 && phase < ROUNDS ->
    emit_to_tasks(ABORTS);
    goto round
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
    phase = PARKED_DESTROYED
  fi;

round:  // Context::run_ready_handlers
  where = IN_ROUND;
  d_step { passed = false; others = false; queue!PASSED,0 }

in_round:
  if
  :: passed && others -> goto round
  :: passed && !others ->
    passed = false;
    if
    :: phase < ROUNDS -> phase++; goto end_calls
    :: phase == PARKED_DESTROYED ->                              // Worker::end_calls
#ifndef MUTANT_channels_counted
      count = destroyed;
#endif
      destroy_on_channels();
      phase = CHANNELS_DESTROYED;
      goto round
    :: phase == CHANNELS_DESTROYED ->
#ifdef MUTANT_channels_counted
      count = destroyed;
#endif
      if :: CALLS(word) != 0 -> where = IN_END_CALLS :: else -> goto leftovers fi;
#ifdef MUTANT_foreign_not_awaited
      goto leftovers;
#endif
      goto wait_for_foreign
    :: phase == LEFTOVERS_DESTROYED -> goto end_run
    fi
  :: else
  fi;
#ifndef MUTANT_no_restart
  context_stopped = false;                                       // Context::run_ready_handler
#endif
  if
  :: context_stopped -> others = true                            // a user has stopped it again
  :: !context_stopped && nempty(queue) -> goto take
  :: DUE(0)
#if CALLERS > 1
  :: DUE(1)
#endif
  fi;
  goto in_round;

wait_for_foreign:  // Worker::end_calls
  if
  :: CALLS(word) == 0 ->
#ifdef MUTANT_counted_with_foreign
    count = destroyed;
#else
    count = 0;
#endif
    goto leftovers
  :: else
  fi;
  run_ready_handler();
#ifndef MUTANT_not_destroyed_again
  destroy_parked();
  run_ready_handler();
  destroy_on_channels();
#endif
  run_ready_handler();
  if :: CALLS(word) == 0 -> goto wait_for_foreign :: else fi;
  if
  :: context_stopped
  :: !context_stopped && nempty(queue) -> goto take
  fi;
  goto wait_for_foreign;

leftovers:  // Context::destroy_leftovers
  assert(CALLS(word) == 0);
#ifdef MUTANT_gate_closed_late
  close_gate();
#endif
#ifndef MUTANT_no_leftovers
  context_stopped = false;
  d_step {
    do
    :: count != 0 && WORK != 0 && !context_stopped -> work--; count--
    :: else -> break
    od;
    count = 0
  }
  where = IN_LEFTOVERS;

in_leftovers:
  if
#ifdef MUTANT_waits_once
  :: context_stopped
#else
  :: context_stopped && times == 2
  :: context_stopped && times < 2 -> times++; context_stopped = false; goto in_leftovers
#endif
  :: WORK == 0
  :: !context_stopped && WORK != 0 && nempty(queue) -> goto take
  :: empty(queue) && foreign_inside == 0                         // 200 milliseconds are over
  fi;
#else
in_leftovers:
#endif
  destroy_parked();
  phase = LEFTOVERS_DESTROYED;
  goto round;

end_run:
#ifdef MUTANT_ended_without_notify
  lock(); ended = true; cut_off = cut; unlock();
#else
  lock();                                                        // Worker::run
  ended = true;
  cut_off = cut;
  notify_all();
  unlock();
#endif
  drop_owner();                                                  // Worker::start: the thread co-owns the Worker
  thread_over = true
}

// --- Closers: RuntimeBridge::shutdown, and ~RuntimeBridge

#ifdef LIMIT
#define MAY_PASS true
#else
#define MAY_PASS false
#endif

inline wait_changed(id) {  // gives the mutex back and sleeps, in one step
  d_step { asleep[id] = true; mutex = false }
  atomic { !asleep[id] && !mutex -> mutex = true }
}

inline shut_down(id, how) {
  passed = how == DTOR;
#ifdef MUTANT_in_flight_before_close
  seen = CALLS(word);
#endif
#ifdef MUTANT_cancel_before_close
  if :: how == CANCEL -> cancel_all() :: else fi;
#endif
#ifndef MUTANT_closed_after_end
  d_step { touch_worker; word = word | NO_CALLS; closed = true } // Worker::shut_down, Gate::close_to_calls
#endif
  if :: how == CANCEL -> cancel_all() :: else fi;
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
  assert(!lost || cut_off);                                      // Worker::shut_down is true only if no call was cut off
  unlock();
  d_step {
    assert(!thread_made || thread_over);
    assert(!thread_made || CALLS(word) == 0);
    closer_done = true
  }
}

#if CLOSERS > 0
active proctype closer() {
  byte before, seen;
  bool ok, passed;

  if :: HOW0 == STOP -> context_stopped = true :: else fi;       // a user stops the context
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
