//! The lab itself: what it promises to the tests that stand on it.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use raven_api::GatewayNode;
use raven_tests::capture::Capture;
use raven_tests::probe::{self, Echo, Flow};
use raven_tests::{Lab, Masquerade, MasqueradeBy, eventually, privileged};

const SOON: Duration = Duration::from_secs(5);

async fn network() -> Lab {
    Lab::builder().without_kubernetes().up().await.expect("the lab comes up")
}

async fn reached(lab: &Lab, from: &str, to: &str) -> Vec<bool> {
    let mut reached = Vec::new();
    for address in lab.pod(to).addresses() {
        let answer = probe::ping(&lab.pod(from).ns, address).await.expect("ping runs");
        reached.push(answer.is_some());
    }
    reached
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_their_own_pool_and_no_other() {
    if !privileged("pods_reach_their_own_pool_and_no_other") {
        return;
    }
    let lab = network().await;
    for (from, to) in [("cloud-a", "cloud-b"), ("x-a", "x-b"), ("y-b", "y-a")] {
        assert_eq!(reached(&lab, from, to).await, [true, true], "{from} to {to}");
    }
    for (from, to) in [("cloud-a", "x-a"), ("x-a", "cloud-a"), ("x-b", "y-b")] {
        assert_eq!(reached(&lab, from, to).await, [false, false], "{from} to {to}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_see_source_addresses_of_one_pool_unchanged() {
    if !privileged("probes_see_source_addresses_of_one_pool_unchanged") {
        return;
    }
    let lab = network().await;
    let (from, to) = (lab.pod("x-a"), lab.pod("x-b"));
    for (source, target) in from.addresses().into_iter().zip(to.addresses()) {
        let echo = Echo::start(&to.ns, target).expect("echo starts");
        let tcp = probe::tcp_echo(&from.ns, echo.address, &[7; 100_000], SOON).await.expect("TCP");
        assert_eq!(tcp.ip(), source);
        let udp = probe::udp_echo(&from.ns, echo.address, b"seven", SOON).await.expect("UDP");
        assert_eq!(udp.ip(), source);
        let bulk = probe::bulk(&from.ns, &to.ns, target, 20_000_000, SOON * 4).await.expect("bulk");
        assert_eq!((bulk.bytes, bulk.source.ip()), (20_000_000, source));
        let flow = Flow::start(&from.ns, &to.ns, target, 1000).expect("flow starts");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let report = flow.stop().await.expect("flow stops");
        assert!(report.sent > 100, "{report:?}");
        assert_eq!((report.lost, report.duplicated), (0, 0), "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_counts_what_is_lost() {
    if !privileged("a_flow_counts_what_is_lost") {
        return;
    }
    let lab = network().await;
    let (from, to) = (lab.pod("x-a"), lab.pod("x-b"));
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), 1000).expect("flow starts");
    for (table, verdict) in [("some_arrive", "accept"), ("some_are_lost", "drop")] {
        let rule =
            format!("table ip {table} {{ chain in {{ type filter hook input priority 0; meta l4proto udp counter {verdict}; }}; }}\n");
        to.ns.nft(&rule).expect("rules");
        let counted = eventually(SOON, table, async || {
            let listed = to.ns.run("nft", &["list", "table", "ip", table])?;
            ensure!(!listed.contains("packets 0 "), "{listed}");
            Ok(())
        });
        counted.await.expect("the flow runs");
    }
    let report = flow.stop().await.expect("flow stops");
    assert!(report.lost > 0 && report.received > 0, "{report:?}");
    assert_eq!(report.lost + report.received, report.sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_is_behind_nat_and_the_cloud_forwards_its_port() {
    if !privileged("an_edge_is_behind_nat_and_the_cloud_forwards_its_port") {
        return;
    }
    let lab = network().await;
    let gateway = lab.node("cloud-a");
    let x = lab.pool("edge-x");
    let public: [IpAddr; 2] = [lab.cloud().public_v4.into(), lab.cloud().public_v6.into()];
    let seen: [IpAddr; 2] = [x.public_v4.into(), x.public_v6.into()];
    for ((listen, public), seen) in [gateway.lan_v4.into(), gateway.lan_v6.into()].into_iter().zip(public).zip(seen) {
        let _echo = Echo::on(&gateway.ns, SocketAddr::new(listen, 4500)).expect("echo starts");
        let target = SocketAddr::new(public, 4500);
        let source = probe::udp_echo(&lab.node("x-a").ns, target, b"hello", SOON).await.expect("UDP through NAT");
        assert_eq!(source.ip(), seen, "the cloud sees the edge router");
    }
    // Nobody gets in by himself: not to the router, not to what is behind it.
    let _echo = Echo::on(&lab.node("x-a").ns, SocketAddr::new(lab.node("x-a").lan_v4.into(), 4500)).expect("echo");
    let inwards = SocketAddr::new(x.public_v4.into(), 4500);
    let short = Duration::from_millis(500);
    assert!(probe::udp_echo(&gateway.ns, inwards, b"hello", short).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cni_masquerades_what_leaves_the_pool() {
    if !privileged("the_cni_masquerades_what_leaves_the_pool") {
        return;
    }
    for by in MasqueradeBy::all() {
        for (masquerade, expected) in [(Masquerade::BeyondPool, true), (Masquerade::Never, false)] {
            let lab = Lab::builder().without_kubernetes().masquerade(masquerade, by).up().await.expect("lab");
            let (node, pod) = (lab.node("cloud-a"), lab.pod("cloud-a"));
            // The router is outside of the pool's pod prefixes, and knows the way back to the node.
            let router = &lab.cloud().router;
            router.ip("route add 10.244.1.0/24 via 10.0.0.11\nroute add fd00:244:1::/64 via fd10::11\n").expect("routes");
            let pairs: [(IpAddr, IpAddr, IpAddr); 2] = [
                ("10.0.0.1".parse().expect("an address"), node.lan_v4.into(), pod.v4.into()),
                ("fd10::1".parse().expect("an address"), node.lan_v6.into(), pod.v6.into()),
            ];
            for (target, of_node, of_pod) in pairs {
                let echo = Echo::start(router, target).expect("echo starts");
                let seen = probe::udp_echo(&pod.ns, echo.address, b"who am I", SOON).await.expect("UDP");
                assert_eq!(seen.ip(), if expected { of_node } else { of_pod }, "{masquerade:?} by {by:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_of_the_internet_sees_what_crosses_in_clear() {
    if !privileged("a_capture_of_the_internet_sees_what_crosses_in_clear") {
        return;
    }
    let lab = network().await;
    let gateway = lab.node("cloud-a");
    let _echo = Echo::on(&gateway.ns, SocketAddr::new(gateway.lan_v4.into(), 4500)).expect("echo starts");
    let target = SocketAddr::new(lab.cloud().public_v4.into(), 4500);
    let capture = Capture::internet(&lab).await.expect("tcpdump starts");
    probe::udp_echo(&lab.node("x-a").ns, target, b"raven-marker", SOON).await.expect("UDP");
    let recording = capture.stop().await.expect("tcpdump stops");
    assert_eq!(recording.count("udp port 4500").expect("a count"), 2);
    assert!(recording.contains(b"raven-marker").expect("a search"));
    assert!(recording.ensure_nothing_in_clear(&lab, b"another marker").is_ok());
    assert!(recording.ensure_nothing_in_clear(&lab, b"raven-marker").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_have_their_own_bpf_file_system_state_and_devices() {
    if !privileged("nodes_have_their_own_bpf_file_system_state_and_devices") {
        return;
    }
    let lab = network().await;
    let (a, b) = (lab.node("x-a"), lab.node("x-b"));
    a.ns.sh("mkdir /sys/fs/bpf/raven; touch /var/lib/raven/mine /run/raven/mine").expect("writes");
    let seen = b.ns.sh("ls /sys/fs/bpf /var/lib/raven /run/raven").expect("reads");
    assert!(!seen.contains("mine") && !seen.contains("raven\n\n"), "{seen}");
    assert!(a.dir.join("lib/mine").exists());
    assert_eq!(a.ns.sh("ls /sys/class/net").expect("reads"), "cni0\neth0\nlo\npod0\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn labs_side_by_side_do_not_meet_and_leave_nothing() {
    if !privileged("labs_side_by_side_do_not_meet_and_leave_nothing") {
        return;
    }
    let (one, two) = (network().await, network().await);
    assert_ne!(one.id, two.id);
    assert_eq!(reached(&one, "x-a", "x-b").await, [true, true]);
    assert_eq!(reached(&two, "x-a", "x-b").await, [true, true]);
    let (id, dir) = (one.id.clone(), one.dir.clone());
    drop(one);
    assert_eq!(traces(&id, &dir), Vec::<String>::new());
    assert_eq!(reached(&two, "x-a", "x-b").await, [true, true], "the other lab goes on");
}

/// A lab whose owner gets SIGKILL, agents and all.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_owner_leaves_nothing() {
    if !privileged("a_killed_owner_leaves_nothing") {
        return;
    }
    let mut owner = Command::new(env!("CARGO_BIN_EXE_raven-lab"))
        .args(["up", "--hold", "--no-crds"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("raven-lab starts");
    let mut first = String::new();
    // Held until the end: the owner shall die of the signal and not of a closed pipe.
    let mut output = BufReader::new(owner.stdout.take().expect("a pipe"));
    output.read_line(&mut first).expect("it prints the lab's id");
    let id = first.split_whitespace().nth(1).expect("`lab ID …`").to_owned();
    let dir = Path::new("/run/raven-lab").join(&id);
    assert!(!traces(&id, &dir).is_empty());
    owner.kill().expect("SIGKILL");
    owner.wait().expect("its end");
    let gone = eventually(Duration::from_secs(20), "everything is gone", async || {
        let left = traces(&id, &dir);
        ensure!(left.is_empty(), "still there: {left:?}");
        Ok(())
    });
    gone.await.expect("the guardian cleans up");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_knows_the_nodes_and_each_agent_by_its_node() -> Result<()> {
    if !privileged("the_api_server_knows_the_nodes_and_each_agent_by_its_node") {
        return Ok(());
    }
    let lab = Lab::builder().without_crds().up().await?;
    let cluster = lab.cluster();
    let api: Api<Node> = Api::all(cluster.client());
    assert_eq!(api.list(&Default::default()).await?.items.len(), 6);
    let ready = cluster.kubectl(&["get", "nodes", "x-a", "-o", "jsonpath={.status.conditions[0].status} {.spec.podCIDRs}"])?;
    assert_eq!(ready, r#"True ["10.244.3.0/24","fd00:244:3::/64"]"#);
    cluster.set_ready("x-a", false).await?;
    assert!(cluster.kubectl(&["get", "nodes", "x-a"])?.contains("NotReady"));
    // From behind the edge's NAT, by the cloud's public address.
    let node = lab.node("x-a");
    let kubeconfig = cluster.agent_kubeconfig(&lab, node).await?;
    let kubectl = raven_tests::kubernetes::binaries::Binaries::find_or_build()?.kubectl;
    let who = node.ns.run(&kubectl.to_string_lossy(), &["--kubeconfig", &kubeconfig.to_string_lossy(), "auth", "whoami"])?;
    assert!(who.contains("system:serviceaccount:kube-system:raven-agent-account"), "{who}");
    assert!(who.contains("node-name") && who.contains("[x-a]"), "{who}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_may_announce_itself_and_nobody_else() -> Result<()> {
    if !privileged("a_node_may_announce_itself_and_nobody_else") {
        return Ok(());
    }
    let lab = Lab::builder().up().await?;
    let kubeconfig = lab.cluster().agent_kubeconfig(&lab, lab.node("x-a")).await?;
    // The test itself is on the host: only the API server's address differs from what the node uses.
    let text = std::fs::read_to_string(kubeconfig)?;
    let host = lab.host_link.control_plane.to_string();
    let here = lab.dir.join("x-a.kubeconfig");
    std::fs::write(&here, text.replace(&lab.cloud().public_v4.to_string(), &host))?;
    let api: Api<GatewayNode> = Api::all(raven_tests::kubernetes::client(&here).await?);
    for (name, allowed) in [("x-a", true), ("x-b", false)] {
        let object = serde_json::json!({
            "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": name}, "spec": {},
        });
        let written = api.patch(name, &PatchParams::apply("raven-agent"), &Patch::Apply(&object)).await;
        assert_eq!(written.is_ok(), allowed, "{name}: {written:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_test_leaves_evidence() -> Result<()> {
    if !privileged("a_failed_test_leaves_evidence") {
        return Ok(());
    }
    let lab = Lab::builder().up().await?;
    lab.cluster().apply_gateways(&lab).await?;
    let dir = std::env::temp_dir().join(format!("raven-evidence-{}", lab.id));
    lab.save_evidence(&dir)?;
    let read = |file: &str| std::fs::read_to_string(dir.join(file)).expect(file);
    assert!(read("x-a/ip.txt").contains("10.244.3.1"));
    assert!(read("x-a/nft.txt").contains("masquerade"));
    assert!(read("objects.yaml").contains("kind: Gateway"));
    assert!(dir.join("kube-apiserver.log").exists());
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

/// What is still to be seen of a lab on this machine.
fn traces(id: &str, dir: &Path) -> Vec<String> {
    let mut traces = Vec::new();
    traces.extend(dir.exists().then(|| dir.display().to_string()));
    for line in std::fs::read_to_string("/proc/self/mountinfo").expect("mounts").lines() {
        traces.extend(line.contains(id).then(|| line.to_owned()));
    }
    for folder in ["/run/netns", "/sys/class/net"] {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        traces.extend(names.filter(|name| name.starts_with(id)));
    }
    for process in std::fs::read_dir("/proc").expect("processes").flatten() {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        traces.extend(command.contains(id).then_some(command));
    }
    traces
}
