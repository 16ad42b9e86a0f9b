//! Waiting for a condition, with a deadline and the last reason why it did not hold.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::time::{Instant, sleep, timeout_at};

/// Pause between two looks at the condition.
const INTERVAL: Duration = Duration::from_millis(100);

/// Tries `attempt` until it gives `Ok` or the deadline passes; then fails with the last error.
/// `RAVEN_TEST_PATIENCE` (a number) multiplies all deadlines, for slow machines.
pub async fn eventually<T, F, Attempt>(deadline: Duration, what: &str, mut attempt: F) -> Result<T>
where
    F: FnMut() -> Attempt,
    Attempt: Future<Output = Result<T>>,
{
    let deadline = deadline.mul_f64(patience());
    let end = Instant::now() + deadline;
    let mut last = anyhow!("not one attempt ended");
    loop {
        match timeout_at(end, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => last = error,
            Err(_) => {}
        }
        if Instant::now() + INTERVAL >= end {
            return Err(last).with_context(|| format!("{what}: not within {deadline:?}"));
        }
        sleep(INTERVAL).await;
    }
}

/// What deadlines and upper bounds are multiplied by: `RAVEN_TEST_PATIENCE`, 1 when left out.
pub fn patience() -> f64 {
    let factor = std::env::var("RAVEN_TEST_PATIENCE").ok().and_then(|v| v.parse().ok());
    factor.filter(|f: &f64| f.is_finite() && *f > 0.0).unwrap_or(1.0)
}
