//! The thread that carries packets between the two devices.
//!
//! It sleeps in `ppoll` until a packet arrives, one falls due, or the handle has changed
//! something. While packets flow it wakes at most once per [`QUANTUM`] and takes what has come
//! in the meantime in one go, which bounds its processor time at high rates.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;

use super::model::{Model, Side};
use super::tun::Tun;

/// The shortest sleep between two batches.
const QUANTUM: Duration = Duration::from_micros(150);
/// Packets taken from one device before the other gets its turn.
const BATCH: usize = 64;

/// The state that the thread and the handle share.
#[derive(Debug)]
pub(super) struct Shared {
    start: Instant,
    state: Mutex<State>,
    /// An eventfd; writing to it wakes the thread.
    wake: OwnedFd,
}

#[derive(Debug)]
struct State {
    model: Model<Vec<u8>>,
    stop: bool,
}

impl Shared {
    pub(super) fn new(model: Model<Vec<u8>>) -> io::Result<Arc<Self>> {
        use rustix::event::{EventfdFlags, eventfd};
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let state = Mutex::new(State { model, stop: false });
        Ok(Arc::new(Self { start: Instant::now(), state, wake }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside the model leaves counters behind that are at worst off by one packet.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Reads or changes the model at the present time, then wakes the thread.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Model<Vec<u8>>, u64) -> T) -> T {
        let now = self.now();
        let out = f(&mut self.lock().model, now);
        self.wake();
        out
    }

    /// Tells the thread to end.
    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.wake();
    }

    fn wake(&self) {
        // It can fail only when the counter is full, and then the thread is due to wake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Carries packets until told to stop.
pub(super) fn run(shared: &Shared, a: &Tun, b: &Tun, mtu: usize) {
    raise_priority();
    let mut spare: Vec<Vec<u8>> = Vec::new();
    let mut last_wake = Instant::now();
    loop {
        let mut worked = false;
        let next = {
            let mut state = shared.lock();
            if state.stop {
                return;
            }
            for (side, tun) in [(Side::A, a), (Side::B, b)] {
                for _ in 0..BATCH {
                    let mut buf = spare.pop().unwrap_or_default();
                    buf.resize(mtu, 0);
                    match tun.recv(&mut buf) {
                        Ok(n) => {
                            buf.truncate(n);
                            let bytes = u32::try_from(n).unwrap_or(u32::MAX);
                            state.model.offer(shared.now(), side, buf, bytes);
                            worked = true;
                        }
                        Err(e) => {
                            spare.push(buf);
                            if e.kind() != io::ErrorKind::WouldBlock {
                                tracing::debug!(?side, "reading from the device: {e}");
                            }
                            break;
                        }
                    }
                }
            }
            while let Some((side, packet)) = state.model.poll(shared.now()) {
                // An error means that the namespace's device is down: the packet is lost there.
                let _ = if side == Side::A { a } else { b }.send(&packet);
                spare.push(packet);
                worked = true;
            }
            while let Some(packet) = state.model.take_freed() {
                spare.push(packet);
            }
            spare.truncate(4 * BATCH);
            state.model.next_event()
        };
        if worked {
            continue_after_quantum(shared, &mut last_wake);
            continue;
        }
        let wait = next.map(|at| Duration::from_nanos(at.saturating_sub(shared.now())));
        sleep(shared, a, b, wait);
    }
}

/// Waits until [`QUANTUM`] has passed since the last batch. A lone packet never waits.
fn continue_after_quantum(shared: &Shared, last: &mut Instant) {
    let rest = QUANTUM.saturating_sub(last.elapsed());
    if !rest.is_zero() {
        poll_wake(shared, &mut [PollFd::new(&shared.wake, PollFlags::IN)], Some(rest));
    }
    *last = Instant::now();
}

fn sleep(shared: &Shared, a: &Tun, b: &Tun, wait: Option<Duration>) {
    let mut fds = [
        PollFd::new(&shared.wake, PollFlags::IN),
        PollFd::new(a, PollFlags::IN),
        PollFd::new(b, PollFlags::IN),
    ];
    poll_wake(shared, &mut fds, wait);
}

/// Sleeps until one of `fds` is ready or `wait` is over; `fds[0]` is the eventfd.
fn poll_wake(shared: &Shared, fds: &mut [PollFd<'_>], wait: Option<Duration>) {
    let timeout = wait.and_then(|w| Timespec::try_from(w).ok());
    if let Ok(n) = poll(fds, timeout.as_ref())
        && n > 0
        && !fds[0].revents().is_empty()
    {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&shared.wake, &mut count);
    }
}

/// Asks for precise timers and to go before other programs. Both are only for accuracy on a busy
/// machine, so a refusal is no error.
fn raise_priority() {
    // SAFETY: these calls take plain integers and a pointer to a local that outlives the call.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1_000 as libc::c_ulong);
        let mut param: libc::sched_param = std::mem::zeroed();
        param.sched_priority = 1;
        if libc::sched_setscheduler(
            0,
            libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
            &raw const param,
        ) != 0
        {
            libc::setpriority(libc::PRIO_PROCESS, 0, -20);
        }
    }
}
