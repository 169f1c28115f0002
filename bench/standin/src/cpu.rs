//! Stand-in for SuperPI: digits of pi by the spigot of Rabinowitz and Wagon (1995), each thread
//! for itself, nothing shared but a count.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::program::{Config, Program, Worker};
use crate::spin::StopRequested;

/// Digits of one computation: about a millisecond.
pub const DIGITS: usize = 200;

/// pi in [`DIGITS`] digits, again and again.
#[derive(Debug)]
pub struct Cpu {
    threads: u64,
    work: Option<u64>,
    done: AtomicU64,
}

impl Cpu {
    /// `work` is computations of all threads together, dealt out evenly.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self { threads: config.threads as u64, work: config.work, done: AtomicU64::new(0) }
    }
}

impl Program for Cpu {
    fn thread(&self, worker: &mut Worker<'_>) -> Result<(), StopRequested> {
        let index = worker.index as u64;
        let mine = self.work.map(|w| w / self.threads + u64::from(index < w % self.threads));
        let mut done = 0;
        while mine.is_none_or(|m| done < m) {
            worker.go_on()?;
            let digits = pi(DIGITS);
            assert!(digits.starts_with(b"3141592653589793"), "pi is not {digits:?}");
            done += 1;
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn operations(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn finish(&self) -> Result<String, String> {
        let (done, want) = (self.operations(), self.work.unwrap_or(0));
        if done != want {
            return Err(format!("{done} computations of {want}"));
        }
        Ok(blake3::hash(&pi(DIGITS)).to_hex().to_string())
    }
}

/// The first `n` digits of pi in ASCII, without the point.
#[must_use]
pub fn pi(n: usize) -> Vec<u8> {
    let length = 10 * (n + 1) / 3 + 1;
    let mut rest = vec![2_u32; length];
    let mut digits = Vec::with_capacity(n + 1);
    let mut nines = 0;
    let mut predigit = None;
    while digits.len() + nines < n + 1 {
        let mut carry = 0;
        for i in (1..length).rev() {
            let x = 10 * rest[i] + carry * (i as u32 + 1);
            let odd = 2 * i as u32 + 1;
            rest[i] = x % odd;
            carry = x / odd;
        }
        let x = 10 * rest[0] + carry;
        rest[0] = x % 10;
        // A nine may still become a zero by a carry from the digit that follows it.
        match x / 10 {
            9 => nines += 1,
            10 => {
                digits.extend(predigit.map(|p: u8| p + 1));
                digits.extend(std::iter::repeat_n(0, nines));
                (predigit, nines) = (Some(0), 0);
            }
            digit => {
                digits.extend(predigit);
                digits.extend(std::iter::repeat_n(9, nines));
                (predigit, nines) = (u8::try_from(digit).ok(), 0);
            }
        }
    }
    digits.extend(predigit);
    digits.extend(std::iter::repeat_n(9, nines));
    digits.truncate(n);
    digits.iter().map(|d| d + b'0').collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn pi_is_pi() {
        // Decimals 762 to 767 are the six nines of Feynman's point.
        let digits = super::pi(1001);
        assert_eq!(&digits[..20], b"31415926535897932384");
        assert_eq!(&digits[761..771], b"4999999837");
        assert_eq!(&digits[991..], b"2164201989");
    }
}
