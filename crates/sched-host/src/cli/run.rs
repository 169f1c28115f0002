//! `sched run`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use godwit_sched::policy::Alpha;

use super::{Asked, CliError, Progress, percent, print, seconds};
use crate::config::{Config, STATE_DIR};
use crate::service::Service;
use crate::status::{Status, VmStatus};

/// Keep the sibling vCPUs of this host's machines apart and close to each other.
///
/// Works until it is told to end (Ctrl-C, SIGTERM) and then puts everything back; after a kill the
/// next start does.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    /// End after so many seconds
    #[arg(long, value_name = "N")]
    pub seconds: Option<f64>,
    /// Look for machines and place their vCPUs once, then put everything back: a trial
    #[arg(long, conflicts_with = "seconds")]
    pub once: bool,
    /// How often to look at vCPUs, milliseconds
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub period_ms: u64,
    /// From which lag behind its siblings on a vCPU gets a loan, milliseconds
    #[arg(long, default_value_t = 15, value_name = "N")]
    pub threshold_ms: u64,
    /// The most steps of nice of one loan
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub max_steps: i32,
    /// How long a loan lives at most, milliseconds
    #[arg(long, default_value_t = 400, value_name = "N")]
    pub life_ms: u64,
    /// From which distance to a sibling on a turn is lent: this share of a queue's length, as N/M
    #[arg(long, default_value = "2/3", value_name = "N/M")]
    pub alpha: Alpha,
    /// How long a turn is lent, milliseconds; 0: loans for lag only
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub turn_ms: u64,
    /// Run busy machines that are as wide as the host whole, one after the other, for so many
    /// milliseconds each; 0: never
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub gang_ms: u64,
    /// Spread siblings only; no loans, no groups
    #[arg(long)]
    pub no_loans: bool,
    /// Lend only; siblings stay where the kernel puts them
    #[arg(long)]
    pub no_spread: bool,
    /// Only this process (repeatable)
    #[arg(long, value_name = "PID")]
    pub pid: Vec<i32>,
    /// Where the lock and the journal are
    #[arg(long, default_value = STATE_DIR, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl RunArgs {
    /// Works until the end, and prints what was done.
    ///
    /// # Errors
    /// When the service does not start, ends by itself, or can't put something back.
    pub fn run(&self) -> Result<(), CliError> {
        let (config, time) = self.config()?;
        // A machine's vCPUs are held by one descriptor each.
        raise_file_limit();
        let asked = Asked::listen()?;
        let mut progress = Progress::new();
        let service = Service::start(config)?;
        let begin = Instant::now();
        let over = || time.is_some_and(|t| begin.elapsed() >= t);
        while service.works() && !asked.now() && !over() {
            let rest = time.map_or(Duration::MAX, |t| t.saturating_sub(begin.elapsed()));
            std::thread::sleep(rest.min(Duration::from_millis(100)));
            progress.show(|| line(&service.status()));
        }
        progress.clear();
        let works = service.works();
        let status = service.stop();
        if self.json {
            let json = serde_json::to_string_pretty(&status)
                .map_err(|e| CliError::Output(std::io::Error::other(e)))?;
            print(&(json + "\n"))?;
        } else {
            print(&table(&status))?;
        }
        match status.at_end.map_or(0, |r| r.failed) {
            _ if !works => Err(CliError::Fault),
            0 => Ok(()),
            failed => Err(CliError::NotRestored(failed)),
        }
    }

    fn config(&self) -> Result<(Config, Option<Duration>), CliError> {
        let ms = Duration::from_millis;
        let config = Config {
            period: ms(self.period_ms),
            state_dir: self.state_dir.clone(),
            only: (!self.pid.is_empty()).then(|| self.pid.clone()),
            spread: !self.no_spread,
            lend: !self.no_loans,
            threshold: ms(self.threshold_ms),
            max_steps: self.max_steps,
            life: ms(self.life_ms),
            alpha: self.alpha,
            turn: ms(self.turn_ms),
            gang: ms(self.gang_ms),
            ..Config::default()
        };
        if self.no_spread && self.no_loans {
            return Err(CliError::Usage(
                "with --no-spread and --no-loans nothing is left to do".into(),
            ));
        }
        let time = match (self.once, self.seconds) {
            (true, _) => Some(config.scan),
            (false, Some(s)) => Some(seconds("--seconds", s)?),
            (false, None) => None,
        };
        Ok((config, time))
    }
}

fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // A lower limit means fewer machines, and a warning when it is reached.
    let _ = setrlimit(Resource::Nofile, limit);
}

fn line(status: &Status) -> String {
    let lent: usize = status.vms.iter().flat_map(|vm| &vm.vcpus).filter(|v| v.steps < 0).count();
    format!(
        "{:.0} s: {} machines, {} placements, {} loans ({lent} stand)",
        status.seconds,
        status.vms.len(),
        status.placements,
        status.loans.loans
    )
}

fn table(status: &Status) -> String {
    let mut out = format!(
        "{:<20} {:>5} {:<22} {:>6} {:>9} {:>7} {:>7}\n",
        "NAME", "VCPUS", "PCPUS", "LOANS", "CAUGHT UP", "SKEW", "BEFORE"
    );
    for vm in &status.vms {
        let cpus = short(vm.vcpus.iter().map(|v| v.cpus.as_str()).collect::<Vec<_>>().join(" "));
        out += &format!(
            "{:<20} {:>5} {:<22} {:>6} {:>9} {:>7} {:>7}\n",
            vm.name,
            vm.vcpus.len(),
            cpus,
            vm.loans.loans,
            vm.loans.caught_up,
            percent(vm.skew),
            percent(vm.skew_first),
        );
    }
    if status.vms.is_empty() {
        out += "no machine was found\n";
    }
    out += "\n";
    for lesser in &status.lesser {
        out += &format!("without {lesser}\n");
    }
    for VmStatus { name, without, .. } in &status.vms {
        for what in without {
            out += &format!("{name} is without {what}\n");
        }
    }
    out += &format!(
        "{:.1} s, {} placements, {} loans ({} for distance) of {} steps; a look every {:.0} ms took {} of a pCPU\n",
        status.seconds,
        status.placements,
        status.loans.loans,
        status.loans.for_distance,
        status.loans.lent,
        status.period_ms,
        percent(Some(status.cost)),
    );
    if status.gang_turns > 0 {
        out += &format!("{} turns of machines that ran whole\n", status.gang_turns);
    }
    let left = status.at_start;
    if left.threads + left.gone + left.groups > 0 {
        out += &format!(
            "a service that was killed had left {} threads changed and {} groups; put back\n",
            left.threads, left.groups
        );
    }
    if let Some(end) = status.at_end {
        out += &format!("put back: {} threads, {} groups", end.threads, end.groups);
        if end.left > 0 {
            out += &format!("; left as somebody else had set them: {}", end.left);
        }
        out += "\n";
    }
    out
}

fn short(text: String) -> String {
    if text.len() <= 22 { text } else { text.chars().take(19).chain("...".chars()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Args {
        #[command(flatten)]
        run: RunArgs,
    }

    fn parsed(args: &[&str]) -> Result<(Config, Option<Duration>), String> {
        let args = Args::try_parse_from([&["run"], args].concat()).map_err(|e| e.to_string())?;
        args.run.config().map_err(|e| e.to_string())
    }

    #[test]
    fn the_defaults_are_the_configurations_own() {
        let (config, time) = parsed(&[]).expect("defaults");
        assert_eq!((config, time), (Config::default(), None));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(parsed(&["--seconds", "-1"]).is_err());
        assert!(parsed(&["--seconds", "NaN"]).is_err());
        assert!(parsed(&["--no-loans", "--no-spread"]).is_err());
        assert!(parsed(&["--once", "--seconds", "3"]).is_err());
        let (config, _) = parsed(&["--period-ms", "0"]).expect("it is the service that checks");
        assert!(config.check().is_err());
    }
}
