//! NetworkPolicies across pools, enforced by the real kube-router on each node: a pod of another pool is matched by its
//! labels, because its address crosses unchanged.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use raven_tests::kubernetes::binaries::KUBE_ROUTER;
use raven_tests::process::Process;
use raven_tests::{Lab, cni, eventually, probe, proof, require_root, test_name};
use serde_json::{Value, json};

use crate::Running;

/// Time limit for a change of a policy or of a label.
const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn policies_match_pods_of_other_pools_by_their_labels() {
    require_root!();
    if cni::find(&KUBE_ROUTER, test_name!()).expect("look for kube-router").is_none() {
        return;
    }
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    running.check(create_pods(lab));
    let _firewalls: Vec<Process> = running.check(lab.nodes.iter().map(|node| lab.start_kube_router(node)).collect());
    let servers: Vec<_> = running.check(servers(lab));
    let open = |_: &str, _: &str| true;
    running.check(verify(lab, &servers, "without a policy", open).await);

    running.check(policy(
        lab,
        json!({
            "podSelector": {}, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": "client"}}}]}],
        }),
    ));
    let clients = |from: &str, _: &str| ["y-b", "cloud-a"].contains(&from);
    running.check(verify(lab, &servers, "clients only", clients).await);

    running.check(lab.cluster().kubectl(&["label", "pod", "y-b", "role-"]));
    running.check(verify(lab, &servers, "a client that lost its label", |from, _| from == "cloud-a").await);

    running.check(policy(
        lab,
        json!({
            "podSelector": {"matchLabels": {"role": "client"}}, "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": {"matchLabels": {"node": "x-b"}}}]}],
        }),
    ));
    let egress = |from: &str, to: &str| from != "cloud-a" || to == "x-b";
    running.check(verify(lab, &servers, "clients may only send to x-b", egress).await);

    running.check(lab.cluster().kubectl(&["delete", "networkpolicy", "test"]));
    running.check(verify(lab, &servers, "the policy is deleted", open).await);
    running.check(proof::converged(lab).await.map(drop));
}

/// Creates the Pod objects of the lab's pods, as kubelets would report them.
fn create_pods(lab: &Lab) -> Result<()> {
    lab.cluster().kubectl(&["create", "serviceaccount", "default"])?;
    for node in &lab.site().nodes {
        let pod = &node.pods[0];
        let role = if ["y-b", "cloud-a"].contains(&node.name.as_str()) { "client" } else { "other" };
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": node.name, "labels": {"node": node.name, "role": role}},
            "spec": {"nodeName": node.name, "containers": [{"name": "a", "image": "none"}], "automountServiceAccountToken": false},
        });
        apply(lab, &format!("pod-{}", node.name), &object)?;
        let addresses: Vec<Value> = pod.addresses().into_iter().map(|ip| json!({"ip": ip})).collect();
        let status = json!({"status": {
            "phase": "Running", "hostIP": node.lan_v4, "podIP": pod.v4, "podIPs": addresses,
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        let arguments = ["patch", "pod", &node.name, "--subresource=status", "--type=merge", "--patch"];
        lab.cluster().kubectl(&[&arguments[..], &[&status.to_string()]].concat())?;
    }
    Ok(())
}

fn policy(lab: &Lab, spec: Value) -> Result<()> {
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "test"}, "spec": spec,
    });
    apply(lab, "policy", &object)
}

fn apply(lab: &Lab, name: &str, object: &Value) -> Result<()> {
    let path = lab.logs().join(format!("{name}.json"));
    std::fs::write(&path, object.to_string())?;
    lab.cluster().kubectl(&["apply", "--filename", &path.to_string_lossy()]).map(drop)
}

fn servers(lab: &Lab) -> Result<Vec<(String, probe::Echo)>> {
    let nodes = lab.site().nodes.iter();
    nodes.map(|node| Ok((node.name.clone(), probe::Echo::start(&node.pods[0].ns, node.pods[0].v4.into())?))).collect()
}

/// Each pod reaches each server by TCP and UDP exactly if `allowed` (names of the nodes of both).
async fn verify(
    lab: &Lab,
    servers: &[(String, probe::Echo)],
    what: &str,
    allowed: impl Fn(&str, &str) -> bool,
) -> Result<()> {
    for from in &lab.site().nodes {
        for (to, server) in servers.iter().filter(|(to, _)| *to != from.name) {
            let expected = allowed(&from.name, to);
            let tell = format!(
                "{what}: {} → {to} ({}) is {}",
                from.name,
                server.address,
                if expected { "open" } else { "closed" }
            );
            eventually(SOON, &tell, || async {
                let (ns, at): (_, SocketAddr) = (&from.pods[0].ns, server.address);
                let within = Duration::from_millis(if expected { 2000 } else { 300 });
                let tcp = probe::tcp_echo(ns, at, b"policy", within).await;
                let udp = probe::udp_echo(ns, at, b"policy", within).await;
                ensure!((tcp.is_ok(), udp.is_ok()) == (expected, expected), "TCP: {tcp:?}, UDP: {udp:?}");
                tcp.map(drop).or_else(|e| if expected { Err(e) } else { Ok(()) }).context("TCP")
            })
            .await?;
        }
    }
    Ok(())
}
