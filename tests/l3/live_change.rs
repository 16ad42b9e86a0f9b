//! The cluster changes under traffic: what changes arrives in seconds, and nobody else loses a packet.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use raven_api::Gateway;
use raven_tests::{eventually, patience, privileged, probe::Flow};

use crate::Running;

const SOON: Duration = Duration::from_secs(10);
/// How long packets may be lost for one change of a peer with the embedded engine, which cannot change one in place (boringtun): the peer
/// is taken away and put back, and a handshake is made, one message each way. That is milliseconds; the rest is for a busy machine. It is
/// far less than the 5 s (WireGuard's REKEY_TIMEOUT) after which a handshake that got lost is tried again.
const REMADE: Duration = Duration::from_millis(200);

/// How many packets of a flow may be lost for so many changes of peers.
pub(crate) fn lost_at_most(changes: u32, per_second: u32) -> u64 {
    ((REMADE * changes).mul_f64(patience()).as_secs_f64() * f64::from(per_second)) as u64
}

impl Running {
    /// How long from now until a map of a node has, or has not, a prefix.
    pub(crate) async fn until(&self, node: &str, map: &str, words: &str, there: bool) -> Duration {
        let start = Instant::now();
        let what = format!("{map} of {node} {} {words}", if there { "has" } else { "no longer has" });
        let seen = eventually(SOON, &what, || async {
            let dump = self.lab.node(node).ns.sh(&format!("bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/{map} | tr -d ' \\n'"))?;
            ensure!(dump.contains(words) == there, "it is {dump}");
            Ok(())
        });
        self.check(seen.await);
        start.elapsed()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_prefixes_and_gateways_come_and_go_under_traffic() {
    if !privileged("nodes_prefixes_and_gateways_come_and_go_under_traffic") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    let (from, to) = (lab.pod("x-b"), lab.pod("cloud-b"));
    const RATE: u32 = 500;
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), RATE).expect("the flow starts");
    let gateways: Api<Gateway> = Api::all(lab.cluster().client());
    let annotate = async |value: Option<&str>| -> Result<()> {
        let patch = serde_json::json!({ "metadata": { "annotations": { "raven.openyurt.io/extra-allowed-source-cidrs": value } } });
        gateways.patch("edge-y", &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop).context("annotate edge-y")
    };

    running.check(annotate(Some("192.168.77.0/24")).await);
    let joined = running.until("x-b", "REMOTE4", "[192,168,77,0]", true).await;
    println!("convergence: a prefix joins: {} ms from the API to the map of x-b", joined.as_millis());
    running.check(annotate(None).await);
    let left = running.until("x-b", "REMOTE4", "[192,168,77,0]", false).await;
    println!("convergence: a prefix leaves: {} ms", left.as_millis());

    running.check(lab.cluster().delete_node("y-b").await);
    let left = running.until("x-b", "REMOTE4", "[10,244,6,0]", false).await;
    println!("convergence: a node leaves: {} ms", left.as_millis());
    running.check(lab.cluster().apply_node(lab.site(), lab.node("y-b")).await);
    let joined = running.until("x-b", "REMOTE4", "[10,244,6,0]", true).await;
    println!("convergence: a node joins: {} ms", joined.as_millis());

    running.check(gateways.delete("edge-y", &DeleteParams::default()).await.context("delete edge-y"));
    let left = running.until("x-b", "REMOTE4", "[10,244,5,0]", false).await;
    println!("convergence: a Gateway is deleted: {} ms", left.as_millis());

    let report = running.check(flow.stop().await);
    // Each of the five changes what the cloud relays, and so remakes the session of x-a. The kernel's WireGuard loses nothing by it, see
    // the kernel tests.
    println!("convergence: of another site's flow: {report:?}");
    assert!(report.lost <= lost_at_most(5, RATE), "{report:?}");
}
