//! What the scheduler counts, read from its maps.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The counters in the order of `stats.h`, before the histogram of distances.
const NAMES: [&str; 44] = [
    "enqueues",
    "direct",
    "dispatches",
    "switches",
    "preempted",
    "placed_new",
    "placed_woken",
    "placed_moved",
    "stacked",
    "pulled_idle",
    "pulled_balance",
    "checks",
    "exceeded",
    "passed",
    "loans",
    "loan_refused",
    "lent_ns",
    "settled",
    "settled_ns",
    "repaid_ns",
    "returned_ns",
    "lost_ns",
    "carried",
    "paid_ns",
    "credited_ns",
    "forced",
    "force_missed",
    "kicks",
    "gangs",
    "gang_joined",
    "gang_late_ns",
    "gang_kept",
    "crowded",
    "timed",
    "tightened",
    "loosened",
    "yields",
    "yields_to",
    "vms_new",
    "vms_gone",
    "uncoupled",
    "unmirrored",
    "sampled",
    "sampled_ns",
];
const DISTANCES: usize = 16;

/// What is summed over all CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Each counter by its name in `src/bpf/stats.h`, where each is explained.
    #[serde(flatten)]
    pub named: BTreeMap<String, i64>,
    /// How often a sibling was found at a distance of n sixteenths of its queue.
    pub distance_sixteenths: Vec<i64>,
    /// What machines have paid for loans less what they got, nanoseconds of vruntime.
    pub outstanding_ns: i64,
}

impl Counters {
    pub(crate) fn sum<'a>(copies: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut sums = [0i64; NAMES.len() + DISTANCES];
        for copy in copies {
            for (sum, word) in sums.iter_mut().zip(copy.chunks_exact(8)) {
                *sum = sum.wrapping_add(word.try_into().map_or(0, i64::from_ne_bytes));
            }
        }
        let named = NAMES.iter().zip(sums).map(|(name, sum)| ((*name).to_owned(), sum)).collect();
        let distance_sixteenths = sums[NAMES.len()..].to_vec();
        Self { named, distance_sixteenths, outstanding_ns: 0 }
    }

    /// One counter; 0 if there is none of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> i64 {
        self.named.get(name).copied().unwrap_or(0)
    }

    /// Whether lending is zero-sum. Only what is read while nobody lends is exact: the counters
    /// are read one after the other.
    #[must_use]
    pub fn balanced(&self) -> bool {
        let went = ["settled_ns", "returned_ns", "lost_ns"].map(|name| self.get(name));
        let came = ["lent_ns", "repaid_ns"].map(|name| self.get(name));
        came.iter().sum::<i64>() == went.iter().sum::<i64>() + self.outstanding_ns
            && self.get("paid_ns") == self.get("lent_ns")
    }

    /// What a decision took on average: settling and Algorithm 1, or forcing; nanoseconds.
    #[must_use]
    pub fn decision_ns(&self) -> Option<f64> {
        let samples = self.get("sampled");
        (samples > 0).then(|| self.get("sampled_ns") as f64 / samples as f64)
    }

    /// Adds what another load of the scheduler counted.
    pub(crate) fn absorb(&mut self, other: &Self) {
        for (name, value) in &other.named {
            *self.named.entry(name.clone()).or_default() += value;
        }
        self.distance_sixteenths.resize(DISTANCES, 0);
        for (mine, theirs) in self.distance_sixteenths.iter_mut().zip(&other.distance_sixteenths) {
            *mine += theirs;
        }
        self.outstanding_ns += other.outstanding_ns;
    }
}

/// A vCPU as its machine's record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vcpu {
    /// Its thread.
    pub tid: u32,
    /// Where it runs, is queued or ran last.
    pub cpu: u32,
    /// `idle`, `queued` or `running`.
    pub state: String,
    /// What it has borrowed less what it has lent, fading with its turns; microseconds.
    pub net_us: i64,
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    /// Its process or cgroup.
    pub id: u64,
    /// CPU time of its vCPUs since it was noticed, milliseconds.
    pub runtime_ms: f64,
    /// Vruntime that its vCPUs paid for loans, milliseconds.
    pub lent_ms: f64,
    /// What they paid less what they got, and did not pay off or get back yet; milliseconds.
    pub account_ms: f64,
    /// By how many of four steps its threshold is tighter than alpha.
    pub tighter: u32,
    /// Its vCPUs by slot.
    pub vcpus: Vec<Vcpu>,
}

/// The sizes of `struct vm` and `struct vcpu` in `vm.h`.
const VM_HEAD: usize = 24;
const VCPU: usize = 48;
const VM_ACCOUNT: usize = VM_HEAD + 64 * VCPU + 16;
const VM_TIGHTER: usize = VM_ACCOUNT + 24;

impl Vm {
    pub(crate) fn read(id: u64, record: &[u8]) -> Self {
        let ms = |at: usize| word64(record, at) as f64 / 1e6;
        let slots = record.get(VM_HEAD..).unwrap_or_default().chunks_exact(VCPU);
        let vcpus = slots.filter(|slot| word32(slot, 0) != 0).map(|slot| Vcpu {
            tid: word32(slot, 0),
            cpu: word32(slot, 4),
            state: ["idle", "queued", "running"][word32(slot, 8).min(2) as usize].to_owned(),
            net_us: word64(slot, 32).cast_signed() / 1000,
        });
        Self {
            id,
            runtime_ms: ms(0),
            lent_ms: ms(8),
            account_ms: account(record) as f64 / 1e6,
            tighter: word32(record, VM_TIGHTER),
            vcpus: vcpus.collect(),
        }
    }
}

/// What stands in a machine's account, nanoseconds of vruntime.
pub(crate) fn account(record: &[u8]) -> i64 {
    word64(record, VM_ACCOUNT).cast_signed()
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
    word.map_or(0, u64::from_ne_bytes)
}

pub(crate) fn text(bytes: &[std::ffi::c_char]) -> String {
    let bytes = bytes.iter().map(|c| c.cast_unsigned()).take_while(|c| *c != 0);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

/// How far machines fell behind each other: the largest less the smallest CPU time that one got in
/// a window (the thesis' maximum absolute lag). Only machines that were there all the time count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// Over the last second, milliseconds.
    pub last_ms: f64,
    /// The mean over all windows of one second so far.
    pub mean_1s_ms: f64,
    /// The mean over all windows of five seconds so far.
    pub mean_5s_ms: f64,
    /// How many windows of one second.
    pub windows: u64,
}

#[derive(Debug, Clone, PartialEq)]
struct VmTime {
    at: Duration,
    runtime_ms: BTreeMap<u64, f64>,
}

/// Computes [`Lag`] from readings about a second apart.
#[derive(Debug, Default)]
pub(crate) struct LagMeter {
    readings: VecDeque<VmTime>,
    sums: [(f64, u64); 2],
    last_ms: f64,
}

impl LagMeter {
    /// Takes what each machine had run at a time.
    pub(crate) fn take(&mut self, at: Duration, vms: &[Vm]) {
        let runtime_ms = vms.iter().map(|vm| (vm.id, vm.runtime_ms)).collect();
        self.readings.push_back(VmTime { at, runtime_ms });
        if let Some(lag) = self.lag_over(1) {
            self.last_ms = lag;
            self.sums[0].0 += lag;
            self.sums[0].1 += 1;
        }
        if let Some(lag) = self.lag_over(5) {
            self.sums[1].0 += lag;
            self.sums[1].1 += 1;
        }
        while self.readings.len() > 6 {
            self.readings.pop_front();
        }
    }

    fn lag_over(&self, back: usize) -> Option<f64> {
        let now = self.readings.back()?;
        let then = self.readings.get(self.readings.len().checked_sub(back + 1)?)?;
        let got = now.runtime_ms.iter().filter_map(|(id, ms)| Some(ms - then.runtime_ms.get(id)?));
        let (least, most) = got.fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
        // Readings come a little more or less than a second apart.
        let seconds = (now.at - then.at).as_secs_f64();
        (most >= least && seconds > 0.0).then(|| (most - least) * back as f64 / seconds)
    }

    pub(crate) fn lag(&self) -> Lag {
        let mean = |(sum, n): (f64, u64)| if n == 0 { 0.0 } else { sum / n as f64 };
        Lag {
            last_ms: self.last_ms,
            mean_1s_ms: mean(self.sums[0]),
            mean_5s_ms: mean(self.sums[1]),
            windows: self.sums[0].1,
        }
    }
}

/// All there is to know of a scheduler that is loaded: what its socket says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Snapshot {
    /// Of this format.
    pub version: u32,
    /// What couples siblings.
    pub mode: crate::Mode,
    /// From which distance on `sbco` lends.
    pub alpha: String,
    /// The slice, microseconds.
    pub slice_us: u64,
    /// What a virtual machine is.
    pub vm_by: String,
    /// Since the first load.
    pub uptime_ms: u64,
    /// How often it was loaded again because a CPU came or went.
    pub restarts: u32,
    /// What was counted, earlier loads among it.
    pub counters: Counters,
    /// Mean time of a decision.
    pub decision_ns: Option<f64>,
    /// How far machines fell behind each other.
    pub lag: Lag,
    /// The machines there are.
    pub vms: Vec<Vm>,
}

static LOG: Mutex<String> = Mutex::new(String::new());

/// Keeps what libbpf says for whoever reports an error; a library does not print.
pub(crate) fn capture_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Info, |_, line| {
            let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
            // The verifier's last words are the ones that matter.
            if log.len() > 60_000 {
                log.clear();
            }
            log.push_str(&line);
        })));
    });
    LOG.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

pub(crate) fn captured_log() -> String {
    LOG.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_those_of_the_header() {
        let header = include_str!("bpf/stats.h");
        let names: Vec<&str> = header
            .split("X(")
            .skip(1)
            .filter_map(|rest| rest.split_once(')').map(|(name, _)| name))
            .take(NAMES.len() + DISTANCES)
            .collect();
        let distances: Vec<String> = (0..DISTANCES).map(|n| format!("distance_{n}")).collect();
        let expected: Vec<&str> =
            NAMES.iter().copied().chain(distances.iter().map(String::as_str)).collect();
        assert_eq!(names, expected);
        assert_eq!(header.matches("X(").count(), expected.len() + 1, "a counter is not read");
    }

    #[test]
    fn lag_is_the_widest_gap_in_a_window() {
        let vm = |id, runtime_ms| Vm {
            id,
            runtime_ms,
            lent_ms: 0.0,
            account_ms: 0.0,
            tighter: 0,
            vcpus: Vec::new(),
        };
        let mut meter = LagMeter::default();
        meter.take(Duration::from_secs(1), &[vm(1, 100.0), vm(2, 500.0)]);
        assert_eq!(meter.lag().windows, 0);
        // The third came in this window and does not count; the reading is half a second late.
        meter.take(Duration::from_millis(2500), &[vm(1, 400.0), vm(2, 770.0), vm(3, 1.0)]);
        let lag = meter.lag();
        assert!((lag.last_ms - 20.0).abs() < 1e-9, "{lag:?}");
        assert_eq!(lag.windows, 1);
    }

    #[test]
    fn counters_are_summed_over_cpus() {
        let last = NAMES.len() + DISTANCES - 1;
        let one: Vec<u8> = (0..=last as u64).flat_map(u64::to_ne_bytes).collect();
        let sum = Counters::sum([one.as_slice(), &one].into_iter());
        assert_eq!(sum.get("direct"), 2);
        assert_eq!(sum.distance_sixteenths[15], 2 * last as i64);
        let mut both = sum.clone();
        both.absorb(&sum);
        assert_eq!(both.get("direct"), 4);
    }
}
