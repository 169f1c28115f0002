//! What is common to many commands.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use godwit_cloud::daemon::ClientFiles;
use godwit_site::SiteDirs;
use godwit_types::{Mib, Name, OpId};

use crate::cmd;
use crate::out::Format;

/// A mobile cloud: machines that start in an instant and move while they work.
#[derive(Debug, Parser)]
#[command(
    name = "godwit",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 unchanged, 4 not found, \
                  5 refused by state, 124 timed out."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The nouns and verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a center and an AP on this machine, in the background
    Up(cmd::up::Up),
    /// Stop what `up` started; machines run on
    Down(cmd::up::Down),
    /// Execution environments
    Vm(Box<cmd::vm::CommandArgs>),
    /// Docked machines in the pool
    Substrate(cmd::substrate::CommandArgs),
    /// Guest images
    Image(cmd::image::CommandArgs),
    /// Center, APs and devices
    Site(cmd::site::CommandArgs),
    /// Long jobs
    Op(cmd::op::CommandArgs),
    /// Tenants: people who own machines and substrates together
    Tenant(cmd::people::Tenants),
    /// Networks that machines are in
    Network(cmd::network::CommandArgs),
    /// Users of a tenant
    User(cmd::people::Users),
    /// Tokens by which users reach this API (those by which sites join: `godwit site token`)
    Token(cmd::people::Tokens),
    /// What the sites' stores hold
    Pool(cmd::pool::CommandArgs),
    /// Co-scheduling of the vCPUs of this host's machines
    Sched(Box<cmd::sched::CommandArgs>),
    /// Substrates that other tenants may use
    Grant(cmd::share::Grants),
    /// How much a tenant may have
    Quota(cmd::share::Quotas),
    /// Who did what
    Audit(cmd::people::Audit),
    /// Look at what this machine has and lacks
    Doctor(cmd::doctor::Doctor),
    /// Run a cloud center in the foreground
    Center(cmd::role::CenterRole),
    /// Run a CloudAP in the foreground
    Ap(cmd::role::ApRole),
    /// Run one end of a migration (started by a site's daemon)
    Relay(cmd::role::RelayRole),
    /// Print shell completion
    Completion(cmd::shell::Completion),
    /// Print or write manual pages
    Man(cmd::shell::Man),
}

/// Where the center is, and how answers are printed.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ClientArgs {
    /// Form of the answer
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) output: Format,
    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Where the center is.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Connect {
    /// Address of the center's API, e.g. <https://127.0.0.1:7700> [env: GODWIT_API]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) api: Option<String>,
    /// File with the operator's or a user's token (or the token itself in GODWIT_TOKEN) [env: GODWIT_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Certificate of the API, PEM [env: GODWIT_CA]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// As an operator: act in this tenant, not in `default` [env: GODWIT_TENANT]
    #[arg(long, global = true, value_name = "TENANT")]
    pub(crate) tenant: Option<Name>,
    /// Directory of address, token and certificate, as a center writes them [env: GODWIT_CONFIG]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) config: Option<PathBuf>,
}

/// A machine, a substrate or a user: `NAME`, `TENANT/NAME`, or an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named(String);

impl Named {
    /// As it was given.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// As one part of a path.
    pub(crate) fn path(&self) -> String {
        self.0.replace('/', "%2F")
    }
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

impl std::str::FromStr for Named {
    type Err = godwit_types::NameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (tenant, name) = text.split_once('/').map_or((None, text), |(t, n)| (Some(t), n));
        tenant.map(Name::new).transpose()?;
        Name::new(name)?;
        Ok(Self(text.to_owned()))
    }
}

/// What a flag says, or else the environment. Read here and not by the parser, whose usage lines
/// would show each flag that the environment sets as one that is needed.
pub(crate) fn or_env<T: From<String> + Clone>(flag: Option<&T>, variable: &str) -> Option<T> {
    flag.cloned().or_else(|| {
        let value = std::env::var(variable).ok().filter(|v| !v.is_empty());
        value.map(T::from)
    })
}

impl Connect {
    /// The client's files.
    pub(crate) fn files(&self) -> ClientFiles {
        client_files(self.config.as_ref())
    }
}

/// The client's files in `dir`, or in the usual directory.
pub(crate) fn client_files(dir: Option<&PathBuf>) -> ClientFiles {
    or_env(dir, "GODWIT_CONFIG").map_or_else(ClientFiles::usual, |dir| ClientFiles { dir })
}

/// How a change is made.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Change {
    /// Check and tell, change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the operation's id at once instead of waiting for its end
    #[arg(long, conflicts_with_all = ["timeout", "dry_run"])]
    pub(crate) no_wait: bool,
    /// Wait no longer, e.g. 90, 500ms, 5m (exit code 124; the operation goes on)
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Option<Duration>,
}

/// Where a site keeps its things.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Places {
    /// Put all directories of a site below DIR/<site> (images excepted)
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Store, substrates, cow files, keys [default: /var/lib/godwit/<site>]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Sockets; a short path [default: /run/godwit/<site>]
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Memory of machines, on tmpfs [default: /dev/shm/godwit/<site>]
    #[arg(long, value_name = "DIR")]
    pub(crate) ram: Option<PathBuf>,
    /// Guest images [default: /var/cache/godwit/images] [env: GODWIT_IMAGES]
    #[arg(long, value_name = "DIR")]
    pub(crate) images: Option<PathBuf>,
}

impl Places {
    /// The flags that name the same places again, each after a space.
    pub(crate) fn flags(&self) -> String {
        let given =
            [("root", &self.root), ("data", &self.data), ("run", &self.run), ("ram", &self.ram)];
        given
            .into_iter()
            .filter_map(|(flag, dir)| Some(format!(" --{flag} {}", dir.as_ref()?.display())))
            .collect()
    }

    /// The directories of `site`.
    pub(crate) fn dirs(&self, site: &Name) -> SiteDirs {
        let usual = SiteDirs::usual(site);
        let base = self.root.as_ref().map_or_else(
            || usual.clone(),
            |r| SiteDirs {
                images: usual.images.clone(),
                memory: ram_for(r).join(site.as_str()),
                ..SiteDirs::below(&r.join(site.as_str()))
            },
        );
        SiteDirs {
            data: self.data.clone().unwrap_or(base.data),
            run: self.run.clone().unwrap_or(base.run),
            memory: self.ram.clone().unwrap_or(base.memory),
            images: or_env(self.images.as_ref(), "GODWIT_IMAGES").unwrap_or(base.images),
        }
    }
}

/// Guest memory has to be on tmpfs, wherever the rest is: a place there of its own for each root.
fn ram_for(root: &std::path::Path) -> PathBuf {
    let of = godwit_types::Hash::of(root.as_os_str().as_encoded_bytes());
    PathBuf::from(format!("/dev/shm/godwit-{}", of.short()))
}

/// Reads `90`, `90s`, `500ms`, `5m` or `2h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(at);
    let bad = || format!("'{text}' is not a time; write 90, 90s, 500ms, 5m or 2h");
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let ms = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1_000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "d" => number.checked_mul(86_400_000),
        _ => None,
    };
    ms.map(Duration::from_millis).ok_or_else(bad)
}

/// Reads `4096`, `500M`, `20G` or `1T`; the units are binary.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(at);
    let bad = || format!("'{text}' is not a size; write 4096, 500M, 20G or 1T");
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// Reads guest memory: `512` (MiB), `512M`, `4G`, `4GiB`.
pub(crate) fn memory(text: &str) -> Result<Mib, String> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(at);
    let bad = || format!("'{text}' is not an amount of memory; write 512 (MiB), 512M or 4G");
    let number: u32 = digits.parse().map_err(|_| bad())?;
    let mib = match unit {
        "" | "M" | "MiB" => Some(number),
        "G" | "GiB" => number.checked_mul(1024),
        _ => None,
    };
    mib.map(Mib).ok_or_else(bad)
}

/// Reads the id of an operation.
pub(crate) fn op_id(text: &str) -> Result<OpId, String> {
    text.parse().map_err(|_| "that is not an operation's id; see: godwit op list".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_does() {
        fn look(c: &clap::Command, path: &str) {
            for s in c.get_subcommands() {
                let path = format!("{path} {}", s.get_name());
                assert!(s.get_about().is_some(), "{path} has no words");
                look(s, &path);
            }
        }
        look(&Cli::command(), "godwit");
    }

    #[test]
    fn times_are_read_with_their_unit() {
        let ok = |t| duration(t).expect("a time").as_millis();
        assert_eq!([ok("90"), ok("90s"), ok("500ms"), ok("5m")], [90_000, 90_000, 500, 300_000]);
        for bad in ["", "x", "5 m", "-1", "99999999999999999999", "18446744073709551615h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_read_with_their_unit() {
        let ok = |t| bytes(t).expect("a size");
        assert_eq!([ok("0"), ok("4096"), ok("3K"), ok("500M")], [0, 4096, 3 << 10, 500 << 20]);
        assert_eq!([ok("20G"), ok("1T")], [20 << 30, 1 << 40]);
        for bad in ["", "G", "1 G", "-1", "1.5G", "1g", "99999999999T"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_read_with_its_unit() {
        let ok = |t| memory(t).expect("memory").0;
        assert_eq!(
            [ok("512"), ok("512M"), ok("512MiB"), ok("4G"), ok("4GiB")],
            [512, 512, 512, 4096, 4096]
        );
        for bad in ["", "G", "4g", "4T", "-1", "4 G", "99999999G"] {
            assert!(memory(bad).expect_err(bad).contains("4G"), "{bad}");
        }
        assert!(op_id("x").expect_err("no id").contains("godwit op list"));
    }

    #[test]
    fn the_tenant_that_is_made_is_not_the_one_that_is_acted_in() {
        let cli = Cli::try_parse_from(["godwit", "tenant", "create", "acme"]).expect("parses");
        let Command::Tenant(noun) = cli.command else { panic!("another noun") };
        assert_eq!(noun.acts_in(), None);
    }

    #[test]
    fn flags_may_come_at_the_end() {
        for line in [
            "vm create --image tiny --name a -o json",
            "vm dock a --name s -o json",
            "vm activate s --name b -o json",
            "vm migrate b --to cafe --timeout 5m --api https://127.0.0.1:1 -o json",
            "vm delete b -o json",
            "image build tiny",
            "center --name center --api 127.0.0.1:0 --link 127.0.0.1:0 --data /d --run /r --ram /m",
            "ap --name cafe --join x --link 127.0.0.1:0 --pool-limit 20G",
            "site token cafe --lifetime 1h -o json",
            "site token list -o json",
            "site token withdraw 0123456789abcdef",
            "site revoke cafe",
            "vm create --image tiny --memory 4G --vcpus 64",
            "vm exec a --pid 7",
            "vm exec a -i -- /bin/cat -n",
            "image delete tiny --site cafe",
            "vm list --tenant acme",
            "vm migrate acme/web --to cafe",
            "vm activate default/clean --name a",
            "tenant create acme",
            "network create lab --kind private --prefix 10.9.0.0/24",
            "vm activate clean --network default",
            "grant create abiword acme",
            "audit list --limit 10 -o json",
            "audit verify",
            "quota get acme",
            "quota set acme --machines 10 --memory 8G --pool none",
            "user create ann --role admin --tenant acme",
            "token create --user ann --role viewer --lifetime 30d -o json",
            "token delete 0123456789abcdef",
            "token create --local --socket /r/admin.sock",
        ] {
            let words = std::iter::once("godwit").chain(line.split(' '));
            Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for line in [
            "vm create",
            "vm create --image tiny --name ../x",
            "vm migrate a --no-wait --timeout 5",
            "vm create --image tiny --no-wait --dry-run",
            "vm list -o xml",
            "vm create --image tiny --vcpus 300",
            "vm create --image tiny --memory 4X",
            "vm exec a",
            "vm get acme/web/x",
            "vm get /web",
            "network create lab --prefix 10.9.0.1/24",
            "network create lab --kind bridged",
            "user create ann --role root",
            "quota set acme --machines many",
            "token delete x",
            "vm exec a --pid 7 /bin/true",
            "op wait x",
        ] {
            let words = std::iter::once("godwit").chain(line.split(' '));
            let e = Cli::try_parse_from(words).expect_err(line);
            assert_eq!(e.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn directories_follow_the_flags() {
        let cafe = Name::new("cafe").expect("name");
        let p = Places { root: Some("/r".into()), ram: Some("/m".into()), ..Places::default() };
        let d = p.dirs(&cafe);
        assert_eq!(d.data, PathBuf::from("/r/cafe/data"));
        assert_eq!(d.memory, PathBuf::from("/m"));
        assert_eq!(d.images, SiteDirs::usual(&cafe).images);
        assert_eq!(p.flags(), " --root /r --ram /m");
        assert_eq!(Places::default().flags(), "");
    }
}
