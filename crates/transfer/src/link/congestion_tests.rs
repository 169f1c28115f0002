//! The model on simulated paths: a line of a rate behind a queue, a delay, losses by chance.

use super::*;

const PACKET: u64 = 1400;
const MS: Duration = Duration::from_millis(1);

/// One path, which several senders share.
struct Path {
    /// Bits a second.
    rate: f64,
    trip: Duration,
    queue: Duration,
    loss: f64,
    random: u64,
    /// When the line is free again.
    free_at: Instant,
}

impl Path {
    fn new(now: Instant, mbit: f64, trip: Duration, loss: f64) -> Self {
        let queue = Duration::from_millis(50);
        Self { rate: mbit * 1e6, trip, queue, loss, random: 0x9e37_79b9_7f4a_7c15, free_at: now }
    }

    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    /// When the acknowledgement of a packet that is sent now is back; none if it is lost.
    fn carry(&mut self, now: Instant) -> Option<Instant> {
        let starts = self.free_at.max(now);
        if starts - now > self.queue {
            return None;
        }
        self.free_at = starts + Duration::from_secs_f64(PACKET as f64 * 8.0 / self.rate);
        (self.chance() >= self.loss).then_some(self.free_at + self.trip)
    }
}

/// A sender that always has something to send.
struct Flow {
    model: Model,
    /// When each was sent, and when its acknowledgement comes.
    out: VecDeque<(Instant, Option<Instant>)>,
    in_flight: u64,
    /// What pacing allows to be sent, as QUIC's does.
    tokens: f64,
    smooth: Duration,
    got: u64,
    trips: Vec<Duration>,
}

impl Flow {
    fn new(now: Instant) -> Self {
        let model = Model::new(now, PACKET as u16);
        let (out, trips) = (VecDeque::new(), Vec::new());
        Self { model, out, in_flight: 0, tokens: 0.0, smooth: 100 * MS, got: 0, trips }
    }

    /// One step of the time `tick`: what has come back, what is lost, what can be sent.
    fn step(&mut self, now: Instant, tick: Duration, path: &mut Path) {
        let newest = self.out.iter().rposition(|(_, back)| back.is_some_and(|b| b <= now));
        let mut lost = 0;
        let mut any = false;
        for i in (0..newest.map_or(0, |n| n + 1)).rev() {
            let (sent, back) = self.out[i];
            match back {
                Some(back) if back <= now => {
                    self.out.remove(i);
                    self.in_flight -= PACKET;
                    self.got += PACKET;
                    self.trips.push(now - sent);
                    self.smooth = (self.smooth * 7 + (now - sent)) / 8;
                    self.model.acked(now, sent, PACKET);
                    any = true;
                }
                None => {
                    self.out.remove(i);
                    self.in_flight -= PACKET;
                    lost += PACKET;
                }
                Some(_) => {}
            }
        }
        if any {
            self.model.batch_ends(now, self.in_flight, false);
        }
        // All of the newest are lost: a time-out.
        let late =
            self.out.front().is_some_and(|(sent, _)| now - *sent > self.smooth * 3 + 100 * MS);
        if late {
            lost += self.out.len() as u64 * PACKET;
            self.in_flight = 0;
            self.out.clear();
        }
        if lost > 0 {
            self.model.lost(late, lost);
        }
        let window = self.model.window;
        let share = tick.as_secs_f64() / self.smooth.as_secs_f64();
        self.tokens = (self.tokens + window as f64 * 1.25 * share).min(40.0 * PACKET as f64);
        while self.in_flight + PACKET <= window && self.tokens >= PACKET as f64 {
            self.tokens -= PACKET as f64;
            self.model.sent(now, PACKET);
            self.out.push_back((now, path.carry(now)));
            self.in_flight += PACKET;
        }
    }

    /// What came through in Mbit/s and the median round trip, of `time`, counted anew.
    fn figures(&mut self, time: Duration) -> (f64, Duration) {
        let mbit = self.got as f64 * 8.0 / 1e6 / time.as_secs_f64();
        self.trips.sort();
        let trip = self.trips.get(self.trips.len() / 2).copied().unwrap_or_default();
        (self.got, self.trips) = (0, Vec::new());
        (mbit, trip)
    }
}

/// Runs `flows` on `path` for `seconds`; the figures of each, and the time after.
fn run(
    now: &mut Instant,
    path: &mut Path,
    flows: &mut [Flow],
    seconds: u64,
) -> Vec<(f64, Duration)> {
    let tick = MS / 4;
    let time = Duration::from_secs(seconds);
    let end = *now + time;
    while *now < end {
        for flow in flows.iter_mut() {
            flow.step(*now, tick, path);
        }
        *now += tick;
    }
    flows.iter_mut().map(|f| f.figures(time)).collect()
}

#[test]
fn loss_by_chance_costs_what_is_lost_and_no_queue_grows() {
    for (mbit, trip, loss) in [
        (100.0, 35 * MS, 0.0),
        (100.0, 35 * MS, 0.01),
        (100.0, 35 * MS, 0.05),
        (20.0, 80 * MS, 0.05),
        (5.0, 100 * MS, 0.02),
        (1000.0, MS, 0.0),
    ] {
        let mut now = Instant::now();
        let mut path = Path::new(now, mbit, trip, loss);
        let mut flows = [Flow::new(now)];
        run(&mut now, &mut path, &mut flows, 2);
        let (got, median) = run(&mut now, &mut path, &mut flows, 20)[0];
        let what = format!("{mbit} Mbit/s, {trip:?}, {loss}: {got:.1} Mbit/s, {median:?}");
        assert!(got > mbit * (1.0 - loss) * 0.88, "{what}");
        // Our queue, and four packets at the line's pace.
        let four = Duration::from_secs_f64(4.0 * PACKET as f64 * 8.0 / (mbit * 1e6));
        assert!(median < trip + 12 * MS + four, "{what}");
    }
}

#[test]
fn a_path_that_carries_less_or_more_is_found() {
    let mut now = Instant::now();
    let mut path = Path::new(now, 100.0, 35 * MS, 0.0);
    let mut flows = [Flow::new(now)];
    run(&mut now, &mut path, &mut flows, 5);
    path.rate = 5e6;
    run(&mut now, &mut path, &mut flows, 5);
    let (got, trip) = run(&mut now, &mut path, &mut flows, 10)[0];
    assert!(got > 4.2 && trip < 70 * MS, "after a fall {got:.1} Mbit/s, {trip:?}");
    path.rate = 100e6;
    run(&mut now, &mut path, &mut flows, 6);
    let (got, trip) = run(&mut now, &mut path, &mut flows, 10)[0];
    assert!(got > 85.0 && trip < 60 * MS, "after a rise {got:.1} Mbit/s, {trip:?}");
    // A longer way is found by what comes through less and less.
    path.trip = 120 * MS;
    run(&mut now, &mut path, &mut flows, 8);
    let (got, _) = run(&mut now, &mut path, &mut flows, 10)[0];
    assert!(got > 80.0, "on a longer way {got:.1} Mbit/s");
}

#[test]
fn small_messages_whose_answers_are_late_teach_nothing() {
    let mut now = Instant::now();
    let mut flow = Flow::new(now);
    for n in 0..200u32 {
        flow.model.sent(now, 200);
        // Every other one is acknowledged when the other end's timer says so.
        let back = now + (35 + 25 * (n % 2)) * MS;
        flow.model.acked(back, now, 200);
        flow.model.batch_ends(back, 0, true);
        now += 100 * MS;
    }
    assert!(flow.model.window >= FIRST_WINDOW, "{} bytes", flow.model.window);
    let mut path = Path::new(now, 100.0, 35 * MS, 0.0);
    let mut flows = [flow];
    run(&mut now, &mut path, &mut flows, 1);
    let (got, _) = run(&mut now, &mut path, &mut flows, 3)[0];
    assert!(got > 85.0, "{got:.1} Mbit/s");
}

#[test]
fn what_was_seen_of_a_path_lasts_through_an_idle_time() {
    let mut now = Instant::now();
    let mut path = Path::new(now, 100.0, 35 * MS, 0.0);
    let mut flows = [Flow::new(now)];
    run(&mut now, &mut path, &mut flows, 5);
    let [flow] = &mut flows;
    flow.out.clear();
    flow.in_flight = 0;
    for n in 0..200u32 {
        flow.model.sent(now, 200);
        let back = now + (35 + 25 * (n % 2)) * MS;
        flow.model.acked(back, now, 200);
        flow.model.batch_ends(back, 0, n % 3 > 0);
        now += 100 * MS;
    }
    let window = flow.model.window;
    assert!(window > 300_000, "{window} bytes");
    let (got, _) = run(&mut now, &mut path, &mut flows, 1)[0];
    assert!(got > 75.0, "{got:.1} Mbit/s in the first second");
}

#[test]
fn after_an_outage_a_longer_way_is_as_good() {
    let mut now = Instant::now();
    let mut path = Path::new(now, 100.0, 35 * MS, 0.0);
    let mut flows = [Flow::new(now)];
    run(&mut now, &mut path, &mut flows, 3);
    path.loss = 1.0;
    run(&mut now, &mut path, &mut flows, 5);
    (path.loss, path.trip) = (0.0, 120 * MS);
    run(&mut now, &mut path, &mut flows, 4);
    let (got, _) = run(&mut now, &mut path, &mut flows, 5)[0];
    assert!(got > 80.0, "{got:.1} Mbit/s");
}

#[test]
fn two_share_a_path() {
    let mut now = Instant::now();
    let mut path = Path::new(now, 100.0, 35 * MS, 0.0);
    let mut flows = vec![Flow::new(now)];
    run(&mut now, &mut path, &mut flows, 5);
    flows.push(Flow::new(now));
    run(&mut now, &mut path, &mut flows, 20);
    let figures = run(&mut now, &mut path, &mut flows, 40);
    let all: f64 = figures.iter().map(|f| f.0).sum();
    assert!(all > 85.0, "{figures:?}");
    assert!(figures.iter().all(|f| f.0 > 25.0), "{figures:?}");
}

#[test]
fn an_outage_is_over_when_it_is_over() {
    let mut now = Instant::now();
    let mut path = Path::new(now, 100.0, 35 * MS, 0.0);
    let mut flows = [Flow::new(now)];
    run(&mut now, &mut path, &mut flows, 5);
    path.loss = 1.0;
    run(&mut now, &mut path, &mut flows, 5);
    path.loss = 0.0;
    run(&mut now, &mut path, &mut flows, 2);
    let (got, _) = run(&mut now, &mut path, &mut flows, 3)[0];
    assert!(got > 80.0, "{got:.1} Mbit/s");
}
