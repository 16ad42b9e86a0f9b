//! kubectl reaches a pod at an edge behind NAT.

use raven_tests::{
    Lab,
    kubectl::{self, POD, SCRIPT},
    kubelet::Prefer,
    privileged,
    proof::Check,
};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_reaches_a_pod_at_an_edge_by_the_nodes_name() {
    if !privileged("kubectl_reaches_a_pod_at_an_edge_by_the_nodes_name") {
        return;
    }
    let running = Running::of(Lab::builder()).await.expect("the lab starts");
    let _kubelet = running.check(running.lab.start_kubelet("x-b").await);
    running.check(running.lab.run_pod("x-b", POD, SCRIPT).await);
    let server = running.check(running.lab.api_server_on("cloud-b", Prefer::Hostname).await);
    let checks = kubectl::all(&server, "by name", 100);
    report(&running, &checks);
}

fn report(running: &Running, checks: &[Check]) {
    for check in checks {
        println!("{} {}: {}", if check.ok { "ok" } else { "FAILED" }, check.name, check.detail);
    }
    let failed: Vec<String> = checks.iter().filter(|c| !c.ok).map(|c| format!("{}: {}", c.name, c.detail)).collect();
    running.check(if failed.is_empty() { Ok(()) } else { Err(anyhow::anyhow!("{}", failed.join("\n"))) });
    assert!(!running.agents.is_empty());
}
