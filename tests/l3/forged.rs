//! Tests of forged packets: they are dropped, counted under the right reason, and listed.

use raven_tests::{proof, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn forged_packets_are_dropped_counted_and_listed() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let seen = proof::forged(&running.lab, false).await;
    println!("forged: {}", running.check(seen));
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_cannot_send_from_addresses_of_another_pool() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    // The embedded engine; `tests/vm` runs the check with the kernel's WireGuard.
    let seen = proof::rejects_foreign_sources(&running.lab, false).await;
    println!("foreign sources: {}", running.check(seen));
}
