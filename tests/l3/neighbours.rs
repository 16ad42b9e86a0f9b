//! Tests of packets that the kernel loses after Raven has redirected them: the next node does not answer, or the
//! kernel's neighbour table is full. Both are counted, and named with the remedy.

use std::{fs, net::IpAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use raven_tests::{Node, eventually, probe, proof, require_root};

use crate::Running;

const SOON: Duration = Duration::from_secs(60);

/// Limit of the kernel's IPv4 neighbour table, of all network namespaces, until it is dropped.
struct TableLimit(String);

impl TableLimit {
    const PATH: &str = "/proc/sys/net/ipv4/neigh/default/gc_thresh3";

    fn new(entries: u32) -> Result<Self> {
        let before = fs::read_to_string(Self::PATH)?;
        fs::write(Self::PATH, entries.to_string())?;
        Ok(Self(before))
    }
}

impl Drop for TableLimit {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, self.0.trim());
    }
}

async fn metric(node: &Node, name: &str) -> Result<u64> {
    proof::metric(&node.ns, name).await?.with_context(|| format!("{} has no metric {name}", node.name))
}

/// Triggers a run that changes something, and with it a check of the surroundings.
fn look_again(node: &Node) -> Result<()> {
    node.ns.sh("ip rule del pref 100").map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_do_not_answer_and_full_tables_are_reported() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    running.check(proof::converged(lab).await);
    let (gateway, router) = (lab.node("x-a"), &lab.pool("edge-x").router);
    let failures = "raven_neighbour_failures_total{family=\"ipv4\"}";
    let before = running.check(metric(gateway, failures).await);
    assert_eq!(running.check(metric(gateway, "raven_neighbours_unresolved").await), 0);

    // A member is switched off.
    running.check(router.sh("ip link set x-b down"));
    running.check(gateway.ns.sh("ip neigh flush dev eth0"));
    let (from, to) = (lab.pod("cloud-a"), IpAddr::V4(lab.pod("x-b").v4));
    let unresolved = || async {
        ensure!(probe::ping(&from.ns, to).await?.is_none(), "the member still answers");
        look_again(gateway)?;
        let listed = proof::http(&gateway.ns, "[::1]:10265", "/status").await?;
        ensure!(listed.contains("\"unresolvedNeighbours\": [\n    \"10.1.0.12\"\n  ]"), "{listed}");
        ensure!(metric(gateway, "raven_neighbours_unresolved").await? == 1, "it is not counted");
        // The kernel gives up after three seconds.
        ensure!(metric(gateway, failures).await? > before, "no resolution failed yet");
        Ok(())
    };
    running.check(eventually(SOON, "the silent member is listed", unresolved).await);
    running.check(router.sh("ip link set x-b up"));
    let resolved = || async {
        ensure!(probe::ping(&from.ns, to).await?.is_some(), "no answer yet");
        look_again(gateway)?;
        ensure!(metric(gateway, "raven_neighbours_unresolved").await? == 0, "still listed");
        Ok(())
    };
    running.check(eventually(SOON, "the member answers again", resolved).await);

    // A scan of the LAN fills the table.
    let limit = running.check(TableLimit::new(16));
    running.check(
        gateway.ns.sh("for host in $(seq 100 180); do ping -c 1 -W 1 10.1.0.$host >/dev/null 2>&1 & done; wait"),
    );
    running.check(look_again(gateway));
    running
        .until_ready("the full table", |status, message| {
            status == "False" && message.contains("(ARP) was full") && message.contains("neigh.default.gc_thresh3=")
        })
        .await;
    drop(limit);
    assert!(running.check(metric(gateway, "raven_neighbour_overflows_total{family=\"ipv4\"}").await) > 0);
}
