//! Statistics of small samples. All of them ignore the order of the values except the paired
//! ones, whose i-th values belong to the same round.

use serde::{Deserialize, Serialize};

use crate::rng::SplitMix;

/// What a sample looks like.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of values.
    pub n: usize,
    /// The middle value.
    pub median: f64,
    /// The least value.
    pub min: f64,
    /// The greatest value.
    pub max: f64,
    /// Median absolute deviation from the median.
    pub mad: f64,
    /// 95 % confidence interval of the median, by bootstrap; none below three values.
    pub ci95: Option<[f64; 2]>,
}

const RESAMPLES: usize = 2000;

/// The middle value, the mean of both for an even count; none for an empty sample.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut v = values.to_vec();
    v.sort_by(f64::total_cmp);
    let mid = v.len() / 2;
    match v.len() {
        0 => None,
        n if n % 2 == 1 => Some(v[mid]),
        _ => Some(f64::midpoint(v[mid - 1], v[mid])),
    }
}

/// Summarises a sample; none for an empty one.
#[must_use]
pub fn summary(values: &[f64]) -> Option<Summary> {
    let med = median(values)?;
    let deviations: Vec<f64> = values.iter().map(|v| (v - med).abs()).collect();
    Some(Summary {
        n: values.len(),
        median: med,
        min: values.iter().copied().fold(f64::INFINITY, f64::min),
        max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        mad: median(&deviations)?,
        ci95: bootstrap(values),
    })
}

/// 95 % percentile-bootstrap interval of the median (Efron, 1979), the same for the same values.
#[must_use]
pub fn bootstrap(values: &[f64]) -> Option<[f64; 2]> {
    if values.len() < 3 {
        return None;
    }
    let mut rng = SplitMix::new(0x5eed);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let sample: Vec<f64> = values.iter().map(|_| values[rng.below(values.len())]).collect();
            median(&sample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    let at = |q: f64| medians[((medians.len() - 1) as f64 * q).round() as usize];
    Some([at(0.025), at(0.975)])
}

/// How many times `a` each round is of `b` in the same round; rounds with a zero in `b` or
/// without a partner are left out.
#[must_use]
pub fn paired_ratios(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).filter(|(_, b)| **b != 0.0).map(|(a, b)| a / b).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_samples() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        let s = summary(&[1.0, 1.0, 2.0, 2.0, 4.0, 6.0, 9.0]).expect("not empty");
        assert_eq!((s.n, s.median, s.mad, s.min, s.max), (7, 2.0, 1.0, 1.0, 9.0));
        assert_eq!(paired_ratios(&[2.0, 9.0, 1.0], &[1.0, 3.0, 0.0]), [2.0, 3.0]);
    }

    proptest! {
        #[test]
        fn the_parts_of_a_summary_agree(v in proptest::collection::vec(-1e6..1e6f64, 1..40)) {
            let s = summary(&v).expect("not empty");
            prop_assert!(s.min <= s.median && s.median <= s.max);
            prop_assert!(s.mad >= 0.0 && s.mad <= s.max - s.min);
            if let Some([lo, hi]) = s.ci95 {
                prop_assert!(s.min <= lo && lo <= hi && hi <= s.max);
            }
        }
    }
}
