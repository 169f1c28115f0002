//! `sched observe`.

use std::time::Duration;

use godwit_sched::policy::Alpha;

use super::{Asked, CliError, Progress, percent, print, seconds};
use crate::observe::{Config, Report, observe, ratio};

/// Measure how the vCPUs of this host's machines are scheduled, without changing anything.
#[derive(Debug, Clone, clap::Args)]
pub struct ObserveArgs {
    /// For how long to look, seconds
    #[arg(long, default_value_t = 10.0, value_name = "N")]
    pub seconds: f64,
    /// How often to look, milliseconds
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub interval_ms: u64,
    /// The threshold: this share of a queue's length, as N/M
    #[arg(long, default_value = "2/3", value_name = "N/M")]
    pub alpha: Alpha,
    /// Only this process (repeatable)
    #[arg(long, value_name = "PID")]
    pub pid: Vec<i32>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl ObserveArgs {
    /// Looks, and prints what was seen.
    ///
    /// # Errors
    /// When the arguments make no sense, or the host can't be read.
    pub fn run(&self) -> Result<(), CliError> {
        let config = self.config()?;
        let asked = Asked::listen()?;
        let mut progress = Progress::new();
        let time = config.time.as_secs_f64();
        let begin = std::time::Instant::now();
        let report = observe(&config, &|| asked.now(), &mut |samples, vms| {
            let now = begin.elapsed().as_secs_f64();
            progress.show(|| format!("{now:.0} of {time:.0} s: {vms} machines, {samples} samples"));
        });
        progress.clear();
        let report = report.map_err(CliError::Proc)?;
        if self.json {
            let json = serde_json::to_string_pretty(&report)
                .map_err(|e| CliError::Output(std::io::Error::other(e)))?;
            return print(&(json + "\n"));
        }
        print(&table(&report))
    }

    fn config(&self) -> Result<Config, CliError> {
        if !(1..=60_000).contains(&self.interval_ms) {
            return Err(CliError::Usage("--interval-ms must be between 1 and 60000".into()));
        }
        if self.pid.iter().any(|p| *p <= 0) {
            return Err(CliError::Usage("--pid must be above 0".into()));
        }
        Ok(Config {
            time: seconds("--seconds", self.seconds)?,
            interval: Duration::from_millis(self.interval_ms),
            alpha: self.alpha,
            only: (!self.pid.is_empty()).then(|| self.pid.clone()),
        })
    }
}

fn table(report: &Report) -> String {
    let mut out = format!(
        "{:<20} {:>5} {:>8} {:>8} {:>9} {:>8} {:>6} {:>9}\n",
        "NAME", "VCPUS", "STACKED", "FAR", "WAITED", "TOGETHER", "SKEW", "LONGEST"
    );
    for vm in &report.vms {
        let c = &vm.counts;
        out += &format!(
            "{:<20} {:>5} {:>8} {:>8} {:>9} {:>8} {:>6} {:>6.0} ms\n",
            vm.name,
            vm.vcpus,
            percent(ratio(c.stacked, report.samples)),
            percent(ratio(c.far, c.compared)),
            percent(ratio(c.waited_beside, c.parallel)),
            percent(ratio(c.together, c.parallel)),
            percent(Some(vm.skew)),
            vm.longest_wait_ms,
        );
    }
    if report.vms.is_empty() {
        out += "no machine was found\n";
    }
    out += &format!(
        "\n{} samples in {:.1} s, {:.2} ms each; {:.1} threads waited on a busy pCPU; steal {}\n\
         stacked siblings in some machine (table 4.2): {}\n\
         a sibling {} of its queue away or more (table 4.3): {} of {} times\n",
        report.samples,
        report.seconds,
        report.sample_ms,
        report.waiting,
        percent(Some(report.steal)),
        percent(Some(report.any_stacked)),
        report.alpha,
        percent(report.far()),
        report.total.compared,
    );
    if report.by_vruntime < 1.0 {
        out += &format!(
            "of the queues {} were ordered by vruntime, the others, which hold several groups, by \
             last turn\n",
            percent(Some(report.by_vruntime))
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ObserveArgs {
        ObserveArgs {
            seconds: 1.0,
            interval_ms: 20,
            alpha: Alpha::THESIS,
            pid: Vec::new(),
            json: false,
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(args().config().is_ok());
        for wrong in [
            ObserveArgs { seconds: f64::NAN, ..args() },
            ObserveArgs { seconds: -1.0, ..args() },
            ObserveArgs { interval_ms: 0, ..args() },
            ObserveArgs { pid: vec![-4], ..args() },
        ] {
            let refused = wrong.config().expect_err("nonsense");
            assert_eq!(refused.exit_code(), 2);
        }
    }
}
