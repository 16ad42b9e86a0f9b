//! Tests of the proxies' certificates: only the agent on the certificate's node gets it.

use std::time::Duration;

use anyhow::{Context, ensure};
use k8s_openapi::{
    ByteString,
    api::{certificates::v1::CertificateSigningRequest, events::v1::Event},
};
use kube::{
    Api,
    api::{ListParams, PostParams},
};
use raven_api::{
    gateway::{Endpoint, EndpointType},
    proxy::{SIGNER_CLIENT, SIGNER_SERVER},
};
use raven_tests::{Lab, eventually, kubernetes::objects::default_gateway, proof, require_root};
use rcgen::{CertificateParams, KeyPair};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn certificate_for_another_node_is_denied_with_event() {
    require_root!();
    let running = Running::of(Lab::builder()).await.expect("start the lab");
    let lab = &running.lab;
    // The attacker has the token of x-b's agent, as after theft of the node.
    let kubeconfig = running.check(lab.cluster().agent_kubeconfig(lab, lab.node("x-b")).await);
    let text = std::fs::read_to_string(&kubeconfig)
        .expect("read the kubeconfig")
        .replace("198.51.100.10", &lab.host_link.control_plane.to_string());
    std::fs::write(&kubeconfig, text).expect("write the kubeconfig");
    let stolen: Api<CertificateSigningRequest> =
        Api::all(raven_tests::kubernetes::client(&kubeconfig).await.expect("create a client"));
    for (name, signer, usage, reason) in [
        ("x-a", SIGNER_CLIENT, "client auth", "NamesNotAllowed"),
        ("198.51.100.10", SIGNER_SERVER, "server auth", "NotElected"),
    ] {
        let key = KeyPair::generate().expect("generate a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a valid name");
        let pem = params.serialize_request(&key).expect("create the request").pem().expect("encode the request");
        let request = serde_json::from_value(serde_json::json!({
            "metadata": { "generateName": "stolen-" },
            "spec": { "request": ByteString(pem.into_bytes()), "signerName": signer, "usages": ["digital signature", usage] },
        }));
        let created = stolen
            .create(&PostParams::default(), &request.expect("a valid object"))
            .await
            .expect("any agent may create requests");
        let created = created.metadata.name.expect("the request has a name");
        let denied = || async {
            let status = stolen.get(&created).await?.status.context("the request has no status yet")?;
            ensure!(status.certificate.is_none(), "the request was signed");
            let condition = status
                .conditions
                .into_iter()
                .flatten()
                .find(|c| c.type_ == "Denied")
                .context("the request is not denied yet")?;
            ensure!(condition.reason.as_deref() == Some(reason), "{condition:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("the request for {name} is denied"), denied).await);
        let events: Api<Event> = Api::all(lab.cluster().client());
        let reported = || async {
            let events = events.list(&ListParams::default()).await?;
            let event = events
                .items
                .into_iter()
                .find(|e| e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(&created));
            let event = event.context("there is no Event about the request")?;
            ensure!(
                event.reason.as_deref() == Some(reason) && event.note.is_some_and(|n| n.contains("x-b")),
                "the Event has another reason or note"
            );
            Ok(())
        };
        running.check(eventually(SOON, "an Event reports the denial", reported).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_is_revoked_with_its_node_even_if_the_name_is_reused() {
    require_root!();
    let mut running = Running::of(Lab::builder()).await.expect("start the lab");
    // With one listed endpoint, no other node of the pool takes over.
    let mut gateway = default_gateway(running.lab.site(), running.lab.pool("edge-x"));
    let only =
        Endpoint { node_name: "x-a".to_owned(), type_: EndpointType::Proxy, under_nat: true, ..Endpoint::default() };
    gateway.spec.endpoints.push(only);
    running.check(running.lab.cluster().apply_gateway(&gateway).await);
    running.check(running.serve("x-b").await);
    running.check(running.answered("x-b").await);
    let request = || running.request("cloud-b", "x-b", 20);

    // The node is stolen and its Node deleted: its proxy connections are closed, although its
    // certificate has not expired.
    running.check(running.lab.cluster().delete_node("x-a").await);
    let closed = || async {
        let answer = request()?;
        ensure!(answer.contains("no proxy connection to Gateway edge-x"), "unexpected answer {answer:?}");
        Ok(())
    };
    running.check(eventually(SOON, "the proxy connections are closed", closed).await);

    // A new node gets the same name. The stolen one is rejected, and its old token gets no other certificate.
    let refused = || proof::metric(&running.lab.node("cloud-a").ns, "raven_proxy_refused_total{reason=\"NotElected\"}");
    running.check(running.lab.cluster().apply_node(running.lab.site(), running.lab.node("x-a")).await);
    let requests: Api<CertificateSigningRequest> = Api::all(running.lab.cluster().client());
    let denied = || async {
        let requests = requests.list(&ListParams::default()).await?;
        let conditions = requests.items.iter().filter_map(|r| r.status.as_ref()?.conditions.as_ref()).flatten();
        ensure!(
            conditions.into_iter().any(|c| c.type_ == "Denied" && c.reason.as_deref() == Some("NodeReplaced")),
            "{requests:?}"
        );
        Ok(())
    };
    running.check(eventually(SOON, "a request with the old token is denied", denied).await);
    let before = running.check(refused().await);
    let again = || async {
        ensure!(refused().await? > before, "no connection attempt was rejected yet");
        Ok(())
    };
    // After a rejection, the client retries within 30 s, which its jitter may double.
    running.check(eventually(Duration::from_secs(90), "the old certificate is rejected", again).await);
    let answer = running.check(request());
    assert!(answer.contains("no proxy connection to Gateway edge-x"), "{answer}");

    // The new node has its own token.
    running.check(running.lab.cluster().delete_agent_pod("x-a").await);
    running.check(running.lab.cluster().agent_kubeconfig(&running.lab, running.lab.node("x-a")).await);
    running.agent("x-a").restart().expect("restart the agent");
    running.check(running.answered("x-b").await);
}
