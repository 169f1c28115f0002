//! A center and an AP of their own.

use std::fs::File;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use godwit_bench::link::{Link, LinkHandle, LinkSpec, Side};
use godwit_testkit::{MemoryOf, Tmpfs, images, lock, process, turn, within};
use serde_json::Value;

use crate::api::Api;
use crate::archive;
use crate::guest::Guest;
use crate::networks::end_networks;
use crate::run::{Answer, Followed, run};
use crate::setup::{Setup, Use};

/// How long a daemon may take to be ready on a busy machine: it probes accelerators.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// How long an AP may take to be back at its center: it pauses up to ten seconds between tries,
/// and the center has to find out that the old link is gone.
const BACK_WITHIN: Duration = Duration::from_secs(90);

/// Which daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// `godwit center`, site `center`.
    Center,
    /// `godwit ap`, site `cafe`.
    Ap,
}

impl Daemon {
    /// The name of its site.
    #[must_use]
    pub const fn site(self) -> &'static str {
        match self {
            Self::Center => "center",
            Self::Ap => "cafe",
        }
    }
}

/// A center and an AP, each a process, and all that they start.
#[derive(Debug)]
pub struct Cloud {
    mounts: Vec<(Daemon, Use, Tmpfs)>,
    flags: Vec<(Daemon, String)>,
    co_scheduling: bool,
    program: PathBuf,
    /// Daemons that are of another build.
    others: Vec<(Daemon, PathBuf)>,
    // Unmounted before, where that is a file system of its own.
    memory: MemoryOf,
    root: tempfile::TempDir,
    link: u16,
    center: Option<Child>,
    ap: Option<Child>,
    // Its namespaces go when nobody is in them any more.
    net: Option<LinkHandle>,
    /// None: within the turn of the cloud that started it.
    _turn: Option<File>,
}

impl Cloud {
    /// Starts a center and an AP that has joined it.
    #[must_use]
    pub fn start() -> Self {
        Setup::new().start()
    }

    /// Starts a center and an AP, each in a network namespace, with an emulated link between them
    /// of `rate_mbit` and `delay_ms` each way.
    #[must_use]
    pub fn over_link(rate_mbit: f64, delay_ms: f64) -> Self {
        Setup::new().over_link(rate_mbit, delay_ms).start()
    }

    /// Starts a center.
    #[must_use]
    pub fn center_only() -> Self {
        Setup::new().center_only()
    }

    /// Starts nothing: only the command, and directories that are cleared at the end.
    #[must_use]
    pub fn nothing() -> Self {
        Self::bare(Setup::new())
    }

    /// Lets the AP join.
    pub fn join_ap(&mut self) {
        let token = self.token("cafe");
        // Not on its command line, which everybody may read.
        let file = self.file("join-token");
        std::fs::write(&file, token).expect("a file");
        self.spawn(Daemon::Ap, &["--join", &format!("@{}", file.display())]);
        self.wait_ap();
    }

    pub(crate) fn with(setup: Setup) -> Self {
        let mut cloud = Self::bare(setup);
        cloud.spawn(Daemon::Center, &[]);
        cloud
    }

    fn bare(setup: Setup) -> Self {
        let program = program();
        image();
        let turn = turn();
        Self::in_turn(setup, program, Some(turn))
    }

    fn in_turn(setup: Setup, program: PathBuf, turn: Option<File>) -> Self {
        // Sockets below it must have short paths.
        let root = tempfile::Builder::new().prefix("gwt").tempdir().expect("a directory");
        // The AP keeps the center's address, so it must be the same after a restart.
        let link = free_port();
        let net = setup.net.map(|(rate_mbit, delay_ms)| {
            let name = format!("tests-{}", std::process::id());
            let name = godwit_types::Name::new(&name).expect("a name");
            Link::create(LinkSpec::new(name, rate_mbit, delay_ms)).expect("an emulated link")
        });
        let mut cloud = Self {
            mounts: Vec::new(),
            flags: setup.flags,
            co_scheduling: setup.co_scheduling,
            program,
            others: setup.others,
            memory: MemoryOf::root(root.path()),
            root,
            link,
            center: None,
            ap: None,
            net,
            _turn: turn,
        };
        cloud.make_hold_dir();
        for (at, what, mib) in setup.mounts {
            let path = match what {
                Use::Disk => cloud.site_dir(at).join("data"),
                Use::Ram => cloud.memory.path().join(at.site()),
            };
            cloud.mounts.push((at, what, Tmpfs::mount(&path, mib)));
        }
        cloud
    }

    /// The emulated link between the two sites.
    #[must_use]
    pub fn net(&self) -> &LinkHandle {
        self.net.as_ref().expect("a cloud over a link")
    }

    /// Where a daemon listens for other sites.
    pub(crate) fn link_address(&self, which: Daemon) -> String {
        let host = match (&self.net, which) {
            (None, _) => "127.0.0.1".to_owned(),
            (Some(net), Daemon::Center) => net.addr_a().to_string(),
            (Some(net), Daemon::Ap) => net.addr_b().to_string(),
        };
        let port = if which == Daemon::Center { self.link } else { 0 };
        format!("{host}:{port}")
    }

    /// Where the center listens for other sites.
    #[must_use]
    pub fn center_link(&self) -> std::net::SocketAddr {
        self.link_address(Daemon::Center).parse().expect("an address")
    }

    /// A join token for `site`.
    #[must_use]
    pub fn token(&self, site: &str) -> String {
        let made = self.ok(&["site", "token", site]);
        made["token"].as_str().expect("a token").to_owned()
    }

    /// Starts a daemon again that was killed.
    pub fn restart(&mut self, which: Daemon) {
        self.spawn(which, &[]);
        self.wait_ap();
    }

    /// Starts a daemon and waits only until it says that it serves.
    pub fn serves(&mut self, which: Daemon) {
        self.spawn(which, &[]);
    }

    /// Starts the center again that was killed.
    pub fn restart_center(&mut self) {
        self.spawn(Daemon::Center, &[]);
    }

    /// Starts both daemons again that were killed.
    pub fn restart_both(&mut self) {
        self.restart_center();
        self.restart(Daemon::Ap);
    }

    /// Gives a daemon that is started again other words on its command line.
    pub fn set_flags(&mut self, which: Daemon, words: &[&str]) {
        self.flags.retain(|(at, _)| *at != which);
        self.flags.extend(words.iter().map(|w| (which, (*w).to_owned())));
    }

    /// A file system that [`Setup::mount`] made.
    #[must_use]
    pub fn mounted(&self, at: Daemon, what: Use) -> &Tmpfs {
        let found = self.mounts.iter().find(|(d, u, _)| *d == at && *u == what);
        &found.unwrap_or_else(|| panic!("no {what:?} of its own at {at:?}")).2
    }

    /// The API of the center, by hand.
    #[must_use]
    pub fn api(&self) -> Api {
        Api::of(&self.root.path().join("config"))
    }

    /// The process of a daemon.
    #[must_use]
    pub fn pid(&self, which: Daemon) -> i32 {
        let child = match which {
            Daemon::Center => &self.center,
            Daemon::Ap => &self.ap,
        };
        child.as_ref().expect("a daemon").id().cast_signed()
    }

    /// Memory that a daemon has in use, in MiB.
    #[must_use]
    pub fn resident_mib(&self, which: Daemon) -> u64 {
        let pid = self.pid(which);
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
    }

    /// Kills a daemon as `kill -9` does.
    pub fn kill(&mut self, which: Daemon) {
        let child = self.child(which).take();
        let mut child = child.unwrap_or_else(|| panic!("{which:?} does not run"));
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    fn child(&mut self, which: Daemon) -> &mut Option<Child> {
        match which {
            Daemon::Center => &mut self.center,
            Daemon::Ap => &mut self.ap,
        }
    }

    /// Starts `godwit ap` with these arguments to its end, which must come.
    #[must_use]
    pub fn ap_ends(&self, site: &str, args: &[&str]) -> Answer {
        let mut command = self.command();
        command.args(["ap", "--name", site, "--root"]).arg(self.root.path()).args(args);
        run(command, format!("godwit ap --name {site}"))
    }

    /// A command that runs on beside the test, its standard output piped.
    #[must_use]
    pub fn begin(&self, args: &[&str]) -> Running {
        let mut command = self.command();
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        Running(command.spawn().unwrap_or_else(|e| panic!("starting {args:?}: {e}")))
    }

    /// A command that runs on beside the test, with the lines that it writes.
    #[must_use]
    pub fn follow(&self, args: &[&str]) -> Followed {
        let mut command = self.command();
        command.args(args);
        Followed::begin(command, format!("godwit {}", args.join(" ")))
    }

    /// Runs `godwit` with the words of `line` on a terminal of its own and gives all that it
    /// drew. Whenever it has drawn the text of the next of `keys`, those are pressed.
    #[must_use]
    pub fn on_terminal(&self, line: &str, keys: &[(&str, &[u8])]) -> String {
        let mut command = self.command_of("script");
        // In place of the shell, which would end by a key that the command takes.
        let line = format!("exec {} {line}", self.program.display());
        command.args(["-qefc", &line, "/dev/null"]).env("TERM", "xterm");
        crate::run::converse(command, &line, keys)
    }

    /// Starts a daemon that does not come to serve, and gives it back to be ended by the test.
    #[must_use]
    pub fn start_unwanted(&self, which: Daemon) -> Unwanted {
        let mut command = self.daemon(which, &[]);
        Unwanted(command.spawn().expect("starting a daemon"))
    }

    /// What a daemon has logged.
    #[must_use]
    pub fn log_text(&self, which: Daemon) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log(which)).unwrap_or_default()).into_owned()
    }

    fn daemon(&self, which: Daemon, args: &[&str]) -> Command {
        let file = File::options().create(true).append(true).open(self.log(which)).expect("log");
        let mut command = self.command_at(which);
        let link = self.link_address(which);
        match which {
            Daemon::Center => {
                command.args(["center", "--api", "127.0.0.1:0", "--link", &link]);
            }
            Daemon::Ap => {
                command.args(["ap", "--link", &link]);
            }
        }
        if !self.co_scheduling {
            command.arg("--no-co-scheduling");
        }
        command.args(["--name", which.site(), "--root"]).arg(self.root.path()).args(args);
        command.args(self.flags.iter().filter(|(at, _)| *at == which).map(|(_, word)| word));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        command
    }

    fn spawn(&mut self, which: Daemon, args: &[&str]) {
        let socket = self.root.path().join("ready");
        // A leftover of an earlier start.
        let _ = std::fs::remove_file(&socket);
        let receiver = UnixDatagram::bind(&socket).expect("bind");
        receiver.set_read_timeout(Some(Duration::from_millis(200))).expect("time-out");
        let log = self.log(which);
        let mut command = self.daemon(which, args);
        let mut child = command.env("NOTIFY_SOCKET", &socket).spawn().expect("starting a daemon");
        let begun = Instant::now();
        let mut word = [0u8; 64];
        while receiver.recv(&mut word).is_err() {
            let ended = child.try_wait().expect("wait");
            if ended.is_some() || begun.elapsed() > READY_WITHIN {
                let _ = child.kill();
                panic!("{which:?} is not ready ({ended:?}):\n{}", tail(&log));
            }
        }
        *self.child(which) = Some(child);
    }

    /// Waits until the AP can be asked by its center.
    pub fn wait_ap(&self) {
        within(BACK_WITHIN, "the AP to be at its center", || {
            let sites = self.json(&["site", "list"])?;
            let cafe = sites.as_array()?.iter().find(|s| s["name"] == "cafe")?.clone();
            let pools = self.json(&["pool", "status"])?;
            let asked = pools.as_array()?.iter().any(|p| p["site"] == "cafe");
            (cafe["state"] == "ready" && asked).then_some(())
        });
    }

    /// The directory below which everything is.
    #[must_use]
    pub fn root(&self) -> &str {
        self.root.path().to_str().expect("a path")
    }

    /// Directory of a site.
    #[must_use]
    pub fn site_dir(&self, which: Daemon) -> PathBuf {
        self.root.path().join(which.site())
    }

    /// A path for a file of a test.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn hold_dir(&self) -> PathBuf {
        self.root.path().join("hold")
    }

    /// Relays have users of their own, and are to be held too.
    fn make_hold_dir(&self) {
        use std::os::unix::fs::PermissionsExt;
        let dir = self.hold_dir();
        std::fs::create_dir_all(&dir).expect("a directory");
        let all = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&dir, all).expect("a directory of everybody's");
    }

    /// Whoever comes to `step` from now on waits there, until [`Cloud::let_go`].
    pub fn hold(&self, step: &str) {
        self.make_hold_dir();
        std::fs::write(self.hold_dir().join(step), "").expect("a request to hold");
    }

    /// Has whoever comes to `step` next panic there.
    ///
    /// # Panics
    /// When that cannot be asked for.
    pub fn panic_at(&self, step: &str) {
        self.make_hold_dir();
        let request = self.hold_dir().join(step);
        // Whole when it is seen.
        let part = self.hold_dir().join(format!("{step}.new"));
        std::fs::write(&part, godwit_hold::PANIC).expect("a request to panic");
        std::fs::rename(part, request).expect("a request to panic");
    }

    /// Waits until somebody is held at `step`, and gives its process.
    pub fn held(&self, step: &str) -> i32 {
        let held = self.hold_dir().join(format!("{step}.held"));
        within(Duration::from_secs(60), &format!("step {step} to be reached"), || {
            std::fs::read_to_string(&held).ok()?.parse().ok()
        })
    }

    /// Lets whoever is held at `step` go on, and takes the request back.
    pub fn let_go(&self, step: &str) {
        let request = self.hold_dir().join(step);
        std::fs::remove_file(request).expect("a request to hold");
        // One who was killed while held leaves its answer behind.
        let _ = std::fs::remove_file(self.hold_dir().join(format!("{step}.held")));
    }

    fn log(&self, which: Daemon) -> PathBuf {
        self.root.path().join(format!("{}.log", which.site()))
    }

    /// As a user at the center's host.
    fn command(&self) -> Command {
        self.command_of(&self.program)
    }

    fn command_of(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.command_in(Daemon::Center, program.as_ref())
    }

    pub(crate) fn command_at(&self, which: Daemon) -> Command {
        let other = self.others.iter().find(|(at, _)| *at == which).map(|(_, program)| program);
        self.command_in(which, other.unwrap_or(&self.program).as_os_str())
    }

    fn command_in(&self, which: Daemon, program: &std::ffi::OsStr) -> Command {
        let mut c = match (&self.net, which) {
            (None, _) => Command::new(program),
            (Some(net), Daemon::Center) => net.command(Side::A, program),
            (Some(net), Daemon::Ap) => net.command(Side::B, program),
        };
        c.env("GODWIT_CONFIG", self.root.path().join("config"));
        c.env(godwit_hold::VARIABLE, self.hold_dir());
        for unset in [
            "GODWIT_API",
            "GODWIT_TOKEN",
            "GODWIT_TOKEN_FILE",
            "GODWIT_CA",
            "GODWIT_TENANT",
            "GODWIT_JOIN_TOKEN",
        ] {
            c.env_remove(unset);
        }
        c
    }

    /// Runs `godwit` with these arguments.
    #[must_use]
    pub fn run(&self, args: &[&str]) -> Answer {
        let mut command = self.command();
        command.args(args);
        run(command, format!("godwit {}", args.join(" ")))
    }

    /// As [`Cloud::ok`], by the command line of another build.
    #[must_use]
    pub fn ok_by(&self, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Value {
        let mut command = self.command_of(program);
        command.args(args).args(["-o", "json"]);
        let a = run(command, format!("another godwit {}", args.join(" ")));
        assert_eq!(a.exit, 0, "{}: {}", a.line, a.stderr);
        a.json()
    }

    /// Runs `godwit` with these arguments and this on its standard input.
    #[must_use]
    pub fn feed(&self, args: &[&str], input: &[u8]) -> Fed {
        let mut command = self.command();
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("starting {args:?}: {e}"));
        let mut to = child.stdin.take().expect("its input");
        let output = std::thread::scope(|scope| {
            // One that refuses its input closes it.
            scope.spawn(move || std::io::Write::write_all(&mut to, input));
            child.wait_with_output().unwrap_or_else(|e| panic!("waiting for {args:?}: {e}"))
        });
        Fed {
            exit: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The answer of `godwit ... -o json`, or `None` when it failed.
    #[must_use]
    pub fn json(&self, args: &[&str]) -> Option<Value> {
        let a = self.run(&[args, &["-o", "json"]].concat());
        (a.exit == 0).then(|| a.json())
    }

    /// The answer of `godwit ... -o json`, which must work.
    #[must_use]
    pub fn ok(&self, args: &[&str]) -> Value {
        let a = self.run(&[args, &["-o", "json"]].concat());
        assert_eq!(a.exit, 0, "{}: {}", a.line, a.stderr);
        a.json()
    }

    /// The words of `godwit ...`, which must fail with `exit` and print nothing else.
    pub fn refused(&self, args: &[&str], exit: i32) -> String {
        let a = self.run(args);
        assert_eq!(a.exit, exit, "{}: {}{}", a.line, a.stdout, a.stderr);
        assert!(a.stdout.is_empty(), "{}: {}", a.line, a.stdout);
        assert!(!a.stderr.contains("panicked"), "{}: {}", a.line, a.stderr);
        a.stderr
    }

    /// An environment as the center has it.
    #[must_use]
    pub fn vm(&self, vm: &str) -> Value {
        self.ok(&["vm", "get", vm])
    }

    /// Its guest.
    #[must_use]
    pub fn guest<'a>(&'a self, vm: &'a str) -> Guest<'a> {
        Guest::new(self, vm)
    }

    /// Waits until an environment runs at `site` as far as the center knows.
    pub fn runs_at(&self, vm: &str, site: &str) {
        let here =
            |v: &Value| v["state"] == "running" && v["site"] == site && v["moving_to"].is_null();
        let begun = Instant::now();
        while !here(&self.vm(vm)) {
            let late = begun.elapsed() > Duration::from_secs(60);
            assert!(!late, "'{vm}' does not run at {site}: {}", self.vm(vm));
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A center that has the substrate `base`: a docked `tiny` machine in which a witness runs.
    /// It is docked once for all tests, and imported here.
    pub fn bring_substrate(&self) {
        let archive = self.substrate_archive();
        let _ = self.ok(&["substrate", "import", archive.to_str().expect("a path")]);
    }

    /// The archive that [`Cloud::bring_substrate`] imports.
    #[must_use]
    pub fn substrate_archive(&self) -> PathBuf {
        let path = archive::path(&self.program, &image());
        let _one = lock("archive");
        if !path.exists() {
            archive::forget_others(&self.program, &path);
            // In a cloud of its own: nothing that this one measures depends on who comes first.
            let mut own = Self::in_turn(Setup::new(), self.program.clone(), None);
            own.spawn(Daemon::Center, &[]);
            let seed = ["vm", "create", "--image", "tiny", "--name", "seed", "--site", "center"];
            let _ = own.ok(&seed);
            own.guest("seed").answers();
            own.guest("seed").start_witness();
            let _ = own.ok(&["vm", "dock", "seed", "--name", "base"]);
            let part = path.with_extension("part");
            let _ = own.run_export("base", &part);
            std::fs::rename(&part, &path).expect("keeping the substrate");
        }
        path
    }

    /// Writes a substrate to a file.
    pub fn run_export(&self, substrate: &str, file: &Path) -> Answer {
        let a = self.run(&["substrate", "export", substrate, file.to_str().expect("a path")]);
        assert_eq!(a.exit, 0, "{}: {}", a.line, a.stderr);
        a
    }

    /// The QEMU of an environment at a site, if it lives.
    #[must_use]
    pub fn qemu(&self, vm: &Value, at: Daemon) -> Option<i32> {
        let id = vm["id"].as_str().expect("an id").replace('-', "");
        process::recorded(&self.site_dir(at).join("run").join(id))
    }

    /// The QEMUs of a site that no record in its run directory names.
    #[must_use]
    pub fn stray_qemus(&self, at: Daemon) -> Vec<i32> {
        let run = self.site_dir(at).join("run");
        let known: Vec<_> = std::fs::read_dir(&run)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| process::recorded(&e.path()))
            .collect();
        let run = run.to_str().expect("a path");
        let all = process::with_word(|w| w.contains(run) && !w.ends_with("relay.json"));
        all.into_iter().filter(|pid| !known.contains(pid) && process::is_qemu(*pid)).collect()
    }

    /// Every QEMU that was started for a site, whoever knows of it.
    #[must_use]
    pub fn qemus(&self, at: Daemon) -> Vec<i32> {
        let run = self.site_dir(at).join("run/");
        let run = run.to_str().expect("a path");
        let mut all = process::with_word(|w| w.contains(run));
        all.retain(|pid| process::word(*pid, |w| w.starts_with("qemu-system-")).is_some());
        all
    }

    /// The QEMUs of a site that wait for an activation.
    #[must_use]
    pub fn waits(&self, at: Daemon) -> Vec<i32> {
        let runs = std::fs::read_dir(self.site_dir(at).join("run")).into_iter().flatten().flatten();
        runs.filter(|e| e.file_name().to_string_lossy().starts_with("wait-"))
            .filter_map(|e| process::recorded(&e.path()))
            .collect()
    }

    /// The relays of a site.
    #[must_use]
    pub fn relays(&self, at: Daemon) -> Vec<i32> {
        let run = self.site_dir(at).join("run/mig-");
        let run = run.to_str().expect("a path");
        process::with_word(|w| w.starts_with(run) && w.ends_with("relay.json"))
    }

    /// What a site's relay says of itself; `None` when there is none, or several.
    #[must_use]
    pub fn relay(&self, at: Daemon) -> Option<Value> {
        let [pid] = self.relays(at)[..] else { return None };
        let config = process::word(pid, |w| w.ends_with("relay.json"))?;
        let config: Value = serde_json::from_slice(&std::fs::read(config).ok()?).ok()?;
        let control = std::os::unix::net::UnixStream::connect(config["control"].as_str()?).ok()?;
        control.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(control), &mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    /// What a site keeps of an environment on disk.
    #[must_use]
    pub fn vm_dir(&self, vm: &Value, at: Daemon) -> PathBuf {
        let id = vm["id"].as_str().expect("an id").replace('-', "");
        self.site_dir(at).join("data/vms").join(id)
    }

    /// Its memory file at a site.
    #[must_use]
    pub fn vm_memory(&self, vm: &Value, at: Daemon) -> PathBuf {
        let id = vm["id"].as_str().expect("an id").replace('-', "");
        self.memory.path().join(at.site()).join(id)
    }

    /// Where a site keeps the memory of its machines.
    #[must_use]
    pub fn memory_dir(&self, at: Daemon) -> PathBuf {
        self.memory.path().join(at.site())
    }

    /// The one operation on `vm` that goes on.
    #[must_use]
    pub fn op(&self, id: &str) -> Value {
        let all = self.ok(&["op", "list"]);
        let ops = all.as_array().expect("a list");
        ops.iter().find(|o| o["id"] == id).unwrap_or_else(|| panic!("no operation {id}")).clone()
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        for child in [&mut self.ap, &mut self.center].into_iter().flatten() {
            // What is gone already needs no end.
            let _ = child.kill();
            let _ = child.wait();
        }
        let root = self.root.path().to_str().expect("a path").to_owned();
        let memory = self.memory.path().to_owned();
        let mine = || {
            let shm = memory.to_str().expect("a path");
            process::with_word(|w| w.contains(&root) || w.contains(shm))
        };
        for site in [Daemon::Center, Daemon::Ap] {
            let runs = std::fs::read_dir(self.site_dir(site).join("run")).into_iter().flatten();
            runs.flatten().filter_map(|e| process::recorded(&e.path())).for_each(process::kill);
        }
        for pid in mine() {
            process::kill(pid);
        }
        let begun = Instant::now();
        while !mine().is_empty() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let sites = [Daemon::Center, Daemon::Ap].map(|site| self.site_dir(site).join("data"));
        end_networks(&sites);
        self.mounts.clear();
        if std::thread::panicking() {
            for which in [Daemon::Center, Daemon::Ap] {
                let text = tail(&self.log(which));
                // Where a test's own words go.
                let _ = std::io::Write::write_all(
                    &mut std::io::stderr(),
                    format!("--- log of {}\n{text}\n", which.site()).as_bytes(),
                );
            }
        }
    }
}

/// How a command ended that was fed, and what it wrote.
#[derive(Debug, Clone)]
pub struct Fed {
    /// Exit code; -1 for a signal.
    pub exit: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

/// A process that ends with the test.
#[derive(Debug)]
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // What is gone already needs no end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon that serves nobody; ended when dropped.
#[derive(Debug)]
pub struct Unwanted(Child);

impl Drop for Unwanted {
    fn drop(&mut self) {
        // One that has ended by itself needs no end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port of this host that nobody uses.
#[must_use]
pub fn free_port() -> u16 {
    let free = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    free.local_addr().expect("its number").port()
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(6000)..]).into_owned()
}

/// The program under test: beside the tests, or what `CARGO_BIN` names.
fn program() -> PathBuf {
    let path = std::env::var_os("CARGO_BIN").map_or_else(
        || {
            let me = std::env::current_exe().expect("the path of this program");
            // Tests lie in a directory below the programs, the tools beside them.
            let dirs = me.ancestors().skip(1).take(2).map(|dir| dir.join("godwit"));
            dirs.fold(PathBuf::new(), |found, path| if found.is_file() { found } else { path })
        },
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "there is no {}: build it first (cargo build -p godwit), or name it in CARGO_BIN",
        path.display()
    );
    path
}

/// The directory of the image `tiny`.
fn image() -> PathBuf {
    let path = images().join("tiny");
    assert!(path.exists(), "there is no {}: godwit image build tiny", path.display());
    path
}
