//! Retries a condition until it holds or a deadline passes, and reports the last reason why it did not hold.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::time::{Instant, sleep, timeout_at};

/// Pause between two attempts.
const INTERVAL: Duration = Duration::from_millis(100);

/// Repeats `attempt` until it returns `Ok`. After the deadline, fails with the last error.
/// `RAVEN_TEST_PATIENCE` (a number) multiplies all deadlines, for slow machines.
pub async fn eventually<T, F, Attempt>(deadline: Duration, what: &str, mut attempt: F) -> Result<T>
where
    F: FnMut() -> Attempt,
    Attempt: Future<Output = Result<T>>,
{
    let deadline = deadline.mul_f64(patience());
    // On a slow machine, an attempt every few milliseconds would keep it from doing what is waited for.
    let interval = INTERVAL.mul_f64(patience());
    let end = Instant::now() + deadline;
    let mut last = anyhow!("no attempt completed");
    loop {
        match timeout_at(end, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => last = error,
            Err(_) => {}
        }
        if Instant::now() + interval >= end {
            return Err(last).with_context(|| format!("{what}: not within {deadline:?}"));
        }
        sleep(interval).await;
    }
}

/// Returns the factor for deadlines and upper bounds: `RAVEN_TEST_PATIENCE`, or 1 if it is not set.
pub fn patience() -> f64 {
    let factor = std::env::var("RAVEN_TEST_PATIENCE").ok().and_then(|v| v.parse().ok());
    factor.filter(|f: &f64| f.is_finite() && *f > 0.0).unwrap_or(1.0)
}
