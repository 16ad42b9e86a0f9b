//! Tests of topology changes under traffic: they take effect in seconds, and other pools lose no packets.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use raven_api::Gateway;
use raven_tests::{eventually, probe::Flow, require_root};

use crate::Running;

const SOON: Duration = Duration::from_secs(10);
impl Running {
    /// Waits until the dump of a node's map contains `words` (or no longer contains it), and returns the time it took.
    pub(crate) async fn until(&self, node: &str, map: &str, words: &str, present: bool) -> Duration {
        let start = Instant::now();
        let what = format!("{map} of {node} {} {words}", if present { "contains" } else { "no longer contains" });
        let seen = eventually(SOON, &what, || async {
            let dump = self
                .lab
                .node(node)
                .ns
                .sh(&format!("bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/{map} | tr -d ' \\n'"))?;
            ensure!(dump.contains(words) == present, "the map is {dump}");
            Ok(())
        });
        self.check(seen.await);
        start.elapsed()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn topology_changes_do_not_interrupt_other_pools() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    let (from, to) = (lab.pod("x-b"), lab.pod("cloud-b"));
    const RATE: u32 = 500;
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), RATE).expect("start the flow");
    let gateways: Api<Gateway> = Api::all(lab.cluster().client());
    let annotate = async |value: Option<&str>| -> Result<()> {
        let patch = serde_json::json!({ "metadata": { "annotations": { "raven.openyurt.io/extra-allowed-source-cidrs": value } } });
        gateways
            .patch("edge-y", &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map(drop)
            .context("annotate edge-y")
    };

    running.check(annotate(Some("192.168.77.0/24")).await);
    let joined = running.until("x-b", "REMOTE4", "[192,168,77,0]", true).await;
    println!("convergence: a prefix is added: {} ms from the API to the map of x-b", joined.as_millis());
    running.check(annotate(None).await);
    let left = running.until("x-b", "REMOTE4", "[192,168,77,0]", false).await;
    println!("convergence: a prefix is removed: {} ms", left.as_millis());

    running.check(lab.cluster().delete_node("y-b").await);
    let left = running.until("x-b", "REMOTE4", "[10,244,6,0]", false).await;
    println!("convergence: a node is removed: {} ms", left.as_millis());
    running.check(lab.cluster().apply_node(lab.site(), lab.node("y-b")).await);
    let joined = running.until("x-b", "REMOTE4", "[10,244,6,0]", true).await;
    println!("convergence: a node is added: {} ms", joined.as_millis());

    running.check(gateways.delete("edge-y", &DeleteParams::default()).await.context("delete edge-y"));
    let left = running.until("x-b", "REMOTE4", "[10,244,5,0]", false).await;
    println!("convergence: a Gateway is deleted: {} ms", left.as_millis());

    let report = running.check(flow.stop().await);
    println!("convergence: another pool's flow: {report:?}");
    assert_eq!(report.lost, 0, "each of the changes affects the prefixes that the cloud relays: {report:?}");
}
