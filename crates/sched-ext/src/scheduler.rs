//! A scheduler that is loaded.

use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;
use std::{fs, io};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, ProgramInput};
use serde::{Deserialize, Serialize};

use crate::check::{Refusal, check};
use crate::config::{Config, ConfigError, Mode, VmBy};
use crate::skeleton::{SchedSkel, SchedSkelBuilder};
use crate::stats::{self, Counters, Vm};

/// `SCX_ECODE_ACT_RESTART`: the kernel asks that the scheduler be loaded again.
const ACT_RESTART: i64 = 1 << 48;
/// From here on `scx_exit_kind` is an error.
const KIND_ERROR: i32 = 1024;

/// Why the scheduler could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// This machine cannot have it, or should not.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A cgroup that was named cannot be read.
    #[error("cgroup {path}")]
    Cgroup {
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// libbpf or the kernel said no.
    #[error("{doing}; the kernel said:\n{log}")]
    Kernel {
        /// What was being done.
        doing: &'static str,
        /// What libbpf and the verifier wrote, or why the kernel gave up at once.
        log: String,
        /// The error.
        source: libbpf_rs::Error,
    },
}

/// Why the kernel has ended the scheduler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// `scx_exit_kind`.
    pub kind: i32,
    /// What the kernel calls it.
    pub reason: String,
    /// Its details, if any.
    pub message: String,
    /// Whether the kernel asks for a new start, since a CPU came or went.
    pub restart: bool,
}

impl Exit {
    /// Whether the kernel ended it for an error: the watchdog, a wrong call.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.kind >= KIND_ERROR
    }
}

/// The scheduler, loaded. Dropping it gives all tasks back to the kernel's own class.
pub struct Scheduler {
    // In the order in which they end: the link first.
    link: Option<Link>,
    skel: SchedSkel<'static>,
    config: Config,
    since: Instant,
}

impl Scheduler {
    /// Loads the scheduler; from its return on it schedules every normal task.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; the machine is then as it was.
    pub fn load(config: &Config) -> Result<Self, LoadError> {
        config.validate()?;
        check()?;
        stats::capture_log();
        let kernel = |doing: &'static str| {
            move |source| LoadError::Kernel { doing, log: stats::captured_log(), source }
        };
        // The generated code wants a place that outlives it; what is left of it when the
        // scheduler ends is a few words.
        let place = Box::leak(Box::new(MaybeUninit::uninit()));
        let mut open = SchedSkelBuilder::default()
            .open(place)
            .map_err(kernel("opening the scheduler's object"))?;
        configure(&mut open, config);
        let skel = open.load().map_err(kernel("loading the scheduler into the kernel"))?;
        let mut this = Self { link: None, skel, config: config.clone(), since: Instant::now() };
        this.list()?;
        match this.skel.maps.godwit.attach_struct_ops() {
            Ok(link) => this.link = Some(link),
            Err(source) => {
                let mut log = stats::captured_log();
                if let Some(exit) = this.exit() {
                    log.push_str(&format!("{} {}", exit.reason, exit.message));
                }
                return Err(LoadError::Kernel { doing: "starting the scheduler", log, source });
            }
        }
        this.since = Instant::now();
        Ok(this)
    }

    /// Names the processes or cgroups that are virtual machines.
    fn list(&self) -> Result<(), LoadError> {
        let ids: Vec<u64> = match &self.config.vm_by {
            VmBy::Names | VmBy::Process(_) => Vec::new(),
            VmBy::Tgid(ids) => ids.iter().copied().map(u64::from).collect(),
            VmBy::Cgroup(paths) => paths
                .iter()
                .map(|path| {
                    // A cgroup's id is the inode of its directory.
                    let path_name = || path.display().to_string();
                    let meta = fs::metadata(path);
                    let meta =
                        meta.map_err(|source| LoadError::Cgroup { path: path_name(), source })?;
                    Ok(meta.ino())
                })
                .collect::<Result<_, LoadError>>()?,
        };
        for id in ids {
            let (key, value) = (id.to_ne_bytes(), 1u32.to_ne_bytes());
            self.skel.maps.listed.update(&key, &value, MapFlags::ANY).map_err(|source| {
                let log = stats::captured_log();
                LoadError::Kernel { doing: "naming the virtual machines", log, source }
            })?;
        }
        Ok(())
    }

    /// How it was configured.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// When it was loaded.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// What it has counted since it was loaded.
    ///
    /// # Errors
    ///
    /// Where its maps cannot be read.
    pub fn counters(&self) -> Result<Counters, libbpf_rs::Error> {
        let zero = 0u32.to_ne_bytes();
        let copies = self.skel.maps.stats.lookup_percpu(&zero, MapFlags::ANY)?;
        let mut counters = Counters::sum(copies.unwrap_or_default().iter().map(Vec::as_slice));
        for key in self.skel.maps.vms.keys() {
            let found = self.skel.maps.vms.lookup(&key, MapFlags::ANY)?;
            counters.outstanding_ns += found.as_deref().map_or(0, stats::account);
        }
        Ok(counters)
    }

    /// The virtual machines it knows, by their ids.
    ///
    /// # Errors
    ///
    /// Where its maps cannot be read.
    pub fn vms(&self) -> Result<Vec<Vm>, libbpf_rs::Error> {
        let mut vms = Vec::new();
        for key in self.skel.maps.vms.keys() {
            let Ok(id) = <[u8; 8]>::try_from(key.as_slice()).map(u64::from_ne_bytes) else {
                continue;
            };
            // It may have ended since its key was seen.
            let Some(record) = self.skel.maps.vms.lookup(&key, MapFlags::ANY)? else { continue };
            vms.push(Vm::read(id, &record));
        }
        vms.sort_by_key(|vm| vm.id);
        Ok(vms)
    }

    /// Why the kernel has ended it; `None` while it schedules.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        let bss = self.skel.maps.bss_data.as_ref()?;
        let kind = bss.exit_kind;
        (kind != 0).then(|| Exit {
            kind,
            reason: stats::text(&bss.exit_reason),
            message: stats::text(&bss.exit_message),
            restart: bss.exit_code & ACT_RESTART != 0,
        })
    }

    /// Gives all tasks back to the kernel's own class; returns what was counted until then.
    ///
    /// # Errors
    ///
    /// Where the maps cannot be read; the tasks are given back all the same.
    pub fn unload(mut self) -> Result<Counters, libbpf_rs::Error> {
        self.detach()
    }

    pub(crate) fn detach(&mut self) -> Result<Counters, libbpf_rs::Error> {
        // Ends when every task has changed its class.
        drop(self.link.take());
        self.counters()
    }

    /// Has thread `from` yield to its sibling `to`, as KVM's directed yield would: what the
    /// scheduler's callback does, called for a test. True if a loan was made.
    ///
    /// # Errors
    ///
    /// Where the program cannot be run, or one of the two threads is not there.
    pub fn test_yield(&self, from: i32, to: i32) -> Result<bool, libbpf_rs::Error> {
        let mut args = [0u8; 8];
        args[..4].copy_from_slice(&from.to_ne_bytes());
        args[4..].copy_from_slice(&to.to_ne_bytes());
        let input = ProgramInput { context_in: Some(&mut args), ..ProgramInput::default() };
        let output = self.skel.progs.yield_test.test_run(input)?;
        match output.return_value.cast_signed() {
            0 => Ok(false),
            1 => Ok(true),
            error => Err(libbpf_rs::Error::from_raw_os_error(-error)),
        }
    }
}

/// What one decision of Algorithm 1 costs on this machine, nanoseconds: a candidate compared with
/// `siblings`, each in a queue of `queued` (at most 128). The mean of `turns`; the scheduler is not
/// loaded for it, and no sched_ext is needed.
///
/// # Errors
///
/// [`LoadError`] where the kernel does not take or run the program.
pub fn decision_cost(queued: u32, siblings: u32, turns: u32) -> Result<f64, LoadError> {
    stats::capture_log();
    let kernel = |doing: &'static str| {
        move |source| LoadError::Kernel { doing, log: stats::captured_log(), source }
    };
    let place = Box::leak(Box::new(MaybeUninit::uninit()));
    let open = SchedSkelBuilder::default().open(place);
    let mut open = open.map_err(kernel("opening the scheduler's object"))?;
    for mut program in open.open_object_mut().progs_mut() {
        let wanted = program.name() == "cost_test";
        program.set_autoload(wanted);
    }
    open.maps.godwit.set_autocreate(false).map_err(kernel("leaving out the scheduler"))?;
    let skel = open.load().map_err(kernel("loading the measurement into the kernel"))?;
    let mut args = [0u8; 24];
    for (at, value) in [queued, siblings, turns].into_iter().enumerate() {
        args[at * 4..][..4].copy_from_slice(&value.to_ne_bytes());
    }
    let input = ProgramInput { context_in: Some(&mut args), ..ProgramInput::default() };
    let output = skel.progs.cost_test.test_run(input);
    let output = output.map_err(kernel("running the measurement"))?;
    if output.return_value != 0 {
        let source = libbpf_rs::Error::from_raw_os_error(-output.return_value.cast_signed());
        return Err(kernel("measuring")(source));
    }
    let ns = args[16..].try_into().map_or(0, u64::from_ne_bytes);
    Ok(ns as f64 / f64::from(turns.max(1)))
}

/// As many CPUs as there may be, and as many caches: `MAX_CPUS` of `vm.h` and `DOMAINS` of `gang.h`.
const MOST_CPUS: usize = 512;
const MOST_DOMAINS: usize = 64;

/// Which of the last-level caches each CPU has, by number; all the same where nothing is known.
fn cache_domains(cpus: &Path) -> [u8; MOST_CPUS] {
    let mut known: Vec<String> = Vec::new();
    let mut domains = [0; MOST_CPUS];
    for (cpu, domain) in domains.iter_mut().enumerate() {
        let cache = |index: u32| cpus.join(format!("cpu{cpu}/cache/index{index}/shared_cpu_list"));
        let last = (0..8).rev().find_map(|index| fs::read_to_string(cache(index)).ok());
        let Some(shared) = last else { continue };
        let at = known.iter().position(|k| *k == shared).unwrap_or_else(|| {
            known.push(shared);
            known.len() - 1
        });
        *domain = (at % MOST_DOMAINS) as u8;
    }
    domains
}

fn configure(open: &mut crate::skeleton::OpenSchedSkel<'static>, config: &Config) {
    if let Some(rodata) = open.maps.rodata_data.as_mut() {
        rodata.coupling = match config.mode {
            Mode::Dft | Mode::Bal => 0,
            Mode::Adaptive | Mode::Sbco | Mode::Strict => 1,
            Mode::Procco => 2,
            Mode::Cpuco => 3,
        };
        rodata.adaptive = config.mode == Mode::Adaptive;
        rodata.domain_of = cache_domains(Path::new("/sys/devices/system/cpu"));
        rodata.distinct = config.mode != Mode::Dft;
        (rodata.alpha_num, rodata.alpha_den) = config.threshold().parts();
        rodata.owe_slices = config.owe_slices;
        rodata.slice_ns = config.slice.as_nanos() as u64;
        rodata.vm_by = match &config.vm_by {
            VmBy::Names => 0,
            VmBy::Process(name) => {
                let mut padded = [0; 16];
                let length = name.len().min(15);
                padded[..length].copy_from_slice(&name.as_bytes()[..length]);
                let (head, tail) = padded.split_at(8);
                let word = |half: &[u8]| half.try_into().map_or(0, u64::from_ne_bytes);
                rodata.process_name = [word(head), word(tail)];
                1
            }
            VmBy::Tgid(_) => 2,
            VmBy::Cgroup(_) => 3,
        };
    }
    // The kernel refuses a scheduler that was prepared for another set of CPUs.
    let seen = fs::read_to_string("/sys/kernel/sched_ext/hotplug_seq").unwrap_or_default();
    open.struct_ops.godwit_mut().timeout_ms = config.watchdog.as_millis() as u32;
    open.struct_ops.godwit_mut().hotplug_seq = seen.trim().parse().unwrap_or(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_that_share_their_last_cache_are_one_domain() {
        let dir = tempfile::tempdir().expect("a folder");
        for (cpu, index, shared) in
            [(0, 2, "0\n"), (0, 3, "0-1\n"), (1, 3, "0-1\n"), (2, 3, "2-3\n"), (3, 3, "2-3\n")]
        {
            let at = dir.path().join(format!("cpu{cpu}/cache/index{index}"));
            fs::create_dir_all(&at).expect("made");
            fs::write(at.join("shared_cpu_list"), shared).expect("written");
        }
        assert_eq!(cache_domains(dir.path())[..5], [0, 0, 1, 1, 0]);
        assert_eq!(cache_domains(Path::new("/nowhere")), [0; MOST_CPUS]);
    }
}
