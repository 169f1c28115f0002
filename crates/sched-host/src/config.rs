//! How the service is to work, and what it is.

use std::path::PathBuf;
use std::time::Duration;

use godwit_sched::policy::Alpha;

/// The state directory where nothing else is said. It need not outlive a boot.
pub const STATE_DIR: &str = "/run/godwit/sched";

/// How the service is to work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// How often vCPUs are looked at, 5 ms to 1 s.
    pub period: Duration,
    /// How often machines are looked for, 100 ms to 60 s.
    pub scan: Duration,
    /// Where the lock and the journal are.
    pub state_dir: PathBuf,
    /// Only these processes; all machines of the host where `None`.
    pub only: Option<Vec<i32>>,
    /// Only processes that were started with this variable in their environment.
    pub mark: Option<String>,
    /// Whether siblings are spread over distinct pCPUs.
    pub spread: bool,
    /// Whether siblings lend to each other.
    pub lend: bool,
    /// From which lag on a loan is made, 1 ms to 1 s.
    pub threshold: Duration,
    /// The most steps of nice of one loan, 1 to 5.
    pub max_steps: i32,
    /// How long a loan lives at most, one period to 10 s.
    pub life: Duration,
    /// From which distance on a loan is made, as a share of a queue's length.
    pub alpha: Alpha,
    /// How long a loan for distance lives, at most 1 s; zero: none are made.
    pub turn: Duration,
    /// How long each machine as wide as the host runs whole before the next does, where they want
    /// more pCPUs than there are: 2 ms to 100 ms; zero: never ([`crate::gang`]).
    pub gang: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            period: Duration::from_millis(20),
            scan: Duration::from_secs(1),
            state_dir: STATE_DIR.into(),
            only: None,
            mark: None,
            spread: true,
            lend: true,
            threshold: Duration::from_millis(15),
            max_steps: 3,
            life: Duration::from_millis(400),
            alpha: Alpha::THESIS,
            turn: Duration::from_millis(20),
            gang: Duration::from_millis(10),
        }
    }
}

/// A configuration that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be between {least} and {most}")]
pub struct BadConfig {
    what: &'static str,
    least: String,
    most: String,
}

impl Config {
    /// Checks every value.
    ///
    /// # Errors
    /// The first that is out of its bounds.
    pub fn check(&self) -> Result<(), BadConfig> {
        let ms = Duration::from_millis;
        within("the period", self.period, ms(5), ms(1000))?;
        within("the scan interval", self.scan, ms(100), ms(60_000))?;
        within("the threshold of a loan", self.threshold, ms(1), ms(1000))?;
        within("the life of a loan", self.life, self.period, ms(10_000))?;
        within("the life of a loan for distance", self.turn, ms(0), ms(1000))?;
        if !self.gang.is_zero() {
            within("a gang's turn", self.gang, ms(2), ms(100))?;
        }
        if !(1..=5).contains(&self.max_steps) {
            let (least, most) = ("1".into(), "5".into());
            return Err(BadConfig { what: "the steps of a loan", least, most });
        }
        let pids = self.only.iter().flatten();
        if pids.copied().any(|p| p <= 0) {
            let (least, most) = ("1".into(), i32::MAX.to_string());
            return Err(BadConfig { what: "a process number", least, most });
        }
        Ok(())
    }
}

fn within(
    what: &'static str,
    value: Duration,
    least: Duration,
    most: Duration,
) -> Result<(), BadConfig> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(BadConfig { what, least: format!("{least:?}"), most: format!("{most:?}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_with_its_bounds() {
        assert_eq!(Config::default().check(), Ok(()));
        let ms = Duration::from_millis;
        for wrong in [
            Config { period: ms(0), ..Config::default() },
            Config { period: ms(5000), ..Config::default() },
            Config { scan: ms(1), ..Config::default() },
            Config { threshold: ms(0), ..Config::default() },
            Config { max_steps: 0, ..Config::default() },
            Config { max_steps: 20, ..Config::default() },
            Config { gang: ms(1), ..Config::default() },
            Config { gang: ms(1000), ..Config::default() },
            Config { life: ms(1), ..Config::default() },
            Config { only: Some(vec![0]), ..Config::default() },
        ] {
            let words = wrong.check().expect_err("nonsense").to_string();
            assert!(words.contains("between"), "{words}");
        }
    }
}
