//! Both versions of the Gateway through the real API server and the webhook.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use raven_api::LABEL_GATEWAY;
use raven_api::conversion::{ANNOTATION_SPEC, ANNOTATION_STATUS};
use raven_api::schema::GATEWAY_CRD;
use raven_tests::eventually;
use serde_json::{Value, json};

use crate::stage::{SOON, Stage, play};

const OLD: &str = "gateways.v1alpha1.raven.openyurt.io";
const NEW: &str = "gateways.v1beta1.raven.openyurt.io";
/// Beside the API server, which reaches it without a Service.
const WEBHOOK: [&str; 2] = ["--webhook-bind-addr=10.0.0.5:9443", "--webhook-url=https://10.0.0.5:9443"];
/// As OpenYurt's documents of that time have it.
const UPSTREAM: &str = "
apiVersion: raven.openyurt.io/v1alpha1
kind: Gateway
metadata:
  name: gw-hangzhou
spec:
  nodeSelector:
    matchLabels:
      raven.openyurt.io/gateway: gw-hangzhou
  endpoints:
  - nodeName: h-a
    underNAT: true
  - nodeName: h-b
    underNAT: true
";

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_are_served_and_no_field_is_lost_on_the_way_there_and_back() {
    play("both_versions_are_served_and_no_field_is_lost_on_the_way_there_and_back", async |stage| {
        // Everything that a v1beta1 Gateway can say.
        let full = json!({
            "nodeSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "k", "operator": "In", "values": ["x", "y"]}]},
            "exposeType": "PublicIP",
            "proxyConfig": {"Replicas": 1, "proxyHTTPPort": "10255,9445", "proxyHTTPSPort": "10250"},
            "tunnelConfig": {"Replicas": 2},
            "endpoints": [
                {"nodeName": "c-a", "type": "tunnel", "port": 4501, "publicPort": 14501, "publicIP": "198.51.100.10", "underNAT": false, "natType": "x", "config": {"publicKey": "k"}},
                {"nodeName": "c-a", "type": "proxy", "port": 10263, "underNAT": false},
            ],
        });
        // Before there is a webhook: the old version is refused, not mutilated.
        stage.put_gateway("full", full.clone()).await?;
        let error = kubectl(stage, &["get", OLD, "full"]).expect_err("nobody converts yet");
        ensure!(format!("{error:?}").contains("conversion webhook for raven.openyurt.io"), "{error:?}");

        stage.put_two_pools().await?;
        stage.put_node("h-a", 4, &[(LABEL_GATEWAY, "gw-hangzhou")]).await?;
        let _controller = stage.controller("one", &WEBHOOK).await?;
        old_is_served(stage).await?;
        stage.two_pools_are_ready().await?;
        stage.until("full", "has conditions", |g| crate::stage::says(g, "Accepted", "False", "EndpointNodeUnknown", "")).await?;

        for name in ["full", "cloud", "site"] {
            let before = stage.gateways.get(name).await?;
            let old = get(stage, OLD, name)?;
            assert_eq!(old["apiVersion"], "raven.openyurt.io/v1alpha1");
            assert_eq!(old["spec"]["endpoints"][0].as_object().map(|e| e.contains_key("port")), Some(false), "it is the old schema");
            // As an old client does who reads and writes all of it, once by update and once by apply.
            kubectl(stage, &["replace", "-f", &file(stage, "old", &old.to_string())?])?;
            let mut applied = old.clone();
            applied["metadata"] = json!({"name": name, "annotations": old["metadata"]["annotations"]});
            applied["status"].take();
            kubectl(stage, &["apply", "--server-side", "--force-conflicts", "-f", &file(stage, "old", &applied.to_string())?])?;
            let after = stage.gateways.get(name).await?;
            assert_eq!((&after.spec, &after.status), (&before.spec, &before.status), "{name}");
            let annotations = after.metadata.annotations.unwrap_or_default();
            assert!(!annotations.contains_key(ANNOTATION_SPEC) && !annotations.contains_key(ANNOTATION_STATUS), "{annotations:?}");
        }
        assert_eq!(get(stage, NEW, "full")?["spec"], full);

        // A user of the old version, who knows of no other.
        for apply in [&["apply", "--server-side"][..], &["apply", "--server-side=false"]] {
            kubectl(stage, &[apply, &["-f", &file(stage, "upstream", UPSTREAM)?]].concat())?;
            let new = get(stage, NEW, "gw-hangzhou")?;
            let endpoint = |node: &str| json!({"nodeName": node, "type": "tunnel", "port": 4500, "underNAT": true});
            assert_eq!(new["spec"]["endpoints"], json!([endpoint("h-a"), endpoint("h-b")]));
            assert_eq!((&new["spec"]["proxyConfig"]["Replicas"], &new["spec"]["tunnelConfig"]["Replicas"]), (&json!(1), &json!(1)));
            eventually(SOON, "the old version shows who was elected", async || {
                let old = get(stage, OLD, "gw-hangzhou")?;
                ensure!(old["status"]["activeEndpoint"]["nodeName"] == "h-a", "{}", old["status"]);
                ensure!(old["status"]["nodes"][0]["subnets"][0] == "10.244.4.0/24", "{}", old["status"]);
                Ok(())
            })
            .await?;
            let line = kubectl(stage, &["get", OLD, "gw-hangzhou", "--no-headers"])?;
            assert_eq!(line.split_whitespace().nth(1), Some("h-a"), "{line}");
            kubectl(stage, &["delete", OLD, "gw-hangzhou"])?;
        }
        // What an old client changes is changed, and what its version does not have stays.
        let patch = json!({"spec": {"endpoints": [{"nodeName": "c-a", "underNAT": false, "publicIP": "198.51.100.20", "config": {"publicKey": "k"}}]}});
        kubectl(stage, &["patch", OLD, "full", "--type=merge", "-p", &patch.to_string()])?;
        let mut expected = full.clone();
        expected["endpoints"] = json!([full["endpoints"][0]]);
        expected["endpoints"][0]["publicIP"] = json!("198.51.100.20");
        assert_eq!(get(stage, NEW, "full")?["spec"], expected);

        let bad = UPSTREAM.replace("spec:", "spec:\n  exposeType: PublicIP");
        let error = kubectl(stage, &["apply", "-f", &file(stage, "bad", &bad)?]).expect_err("behind NAT and exposed");
        ensure!(format!("{error:?}").contains("no endpoint of it may be underNAT"), "{error:?}");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_webhook_outlives_replicas_and_manifests_and_the_stored_version_needs_it_never() {
    play("the_webhook_outlives_replicas_and_manifests_and_the_stored_version_needs_it_never", async |stage| {
        // As installed: the API server asks the Service. Its address is the control plane's own here, for want of a kube-proxy.
        let service =
            kubectl(stage, &["-n", "kube-system", "get", "service", "raven-controller-webhook", "-o", "jsonpath={.spec.clusterIP}"])?;
        stage.lab.control_plane.run("ip", &["address", "add", &format!("{service}/32"), "dev", "lo"])?;
        let at = |port: u16| format!("--webhook-bind-addr={service}:{port}");
        stage.put_two_pools().await?;
        let mut one = stage.controller("one", &[&at(443)]).await?;
        old_is_served(stage).await?;
        stage.two_pools_are_ready().await?;
        let ca = ca_bundle(stage).await?;

        // Every replica serves the same, each at a port of its own here.
        let two = stage.controller("two", &[&at(444)]).await?;
        let bundle = file(stage, "ca", std::str::from_utf8(&ca)?)?;
        eventually(SOON, "the other replica serves it, too", async || {
            let ns = &stage.lab.control_plane;
            let to = format!("raven-controller-webhook.kube-system.svc:444:{service}:444");
            let url = "https://raven-controller-webhook.kube-system.svc:444/convert";
            let answer = ns.run("curl", &["-sS", "--noproxy", "*", "--cacert", &bundle, "--connect-to", &to, url])?;
            ensure!(answer.contains("post a ConversionReview"), "{answer}");
            Ok(())
        })
        .await?;
        drop(two);

        // The manifest again, in all ways that people have: the CA stays, or comes back.
        let crd = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join("crds").join(format!("{GATEWAY_CRD}.yaml"));
        let crd = crd.to_string_lossy().into_owned();
        kubectl(stage, &["apply", "--server-side", "--force-conflicts", "-f", &crd])?;
        old_is_served(stage).await?;
        kubectl(stage, &["apply", "-f", &crd])?;
        old_is_served(stage).await?;
        kubectl(stage, &["replace", "-f", &crd])?;
        old_is_served(stage).await?;
        // That it is served may be by what the API server knew before.
        eventually(SOON, "the CRD has the same CA again", async || {
            ensure!(ca_bundle(stage).await? == ca, "it has another one");
            Ok(())
        })
        .await?;

        // Nobody answers: what is stored can be read and written, and the old version says who is missing.
        one.kill()?;
        let error = kubectl(stage, &["get", OLD, "site"]).expect_err("nobody answers");
        ensure!(format!("{error:?}").contains("conversion webhook for raven.openyurt.io"), "{error:?}");
        assert_eq!(get(stage, NEW, "site")?["metadata"]["name"], "site");
        stage.put_gateway("site", crate::stage::site(&["x-a"])).await?;
        stage.put_gateway("new", json!({})).await?;
        kubectl(stage, &["get", "gw"])?;
        kubectl(stage, &["delete", "gw", "new"])?;

        // The next one takes up what the first left.
        let _three = stage.controller("three", &[&at(443)]).await?;
        old_is_served(stage).await?;
        assert_eq!(ca_bundle(stage).await?, ca);

        // Somebody empties the Secret, as the documents say: all is made anew, and the API server told.
        let empty = r#"[{"op": "remove", "path": "/data"}]"#;
        kubectl(stage, &["-n", "kube-system", "patch", "secret", "raven-controller-webhook", "--type=json", "-p", empty])?;
        // The first one was killed with the Lease in its hand: somebody leads again when that has run out.
        eventually(Duration::from_secs(30), "there is another CA", async || {
            ensure!(ca_bundle(stage).await? != ca);
            Ok(())
        })
        .await?;
        old_is_served(stage).await
    })
    .await;
}

async fn old_is_served(stage: &Stage) -> Result<()> {
    // Mostly within a second. In a few of ten runs the API server goes on asking the old place for some 25 s after its CRD has changed.
    eventually(Duration::from_secs(90), "Gateways of v1alpha1 can be read", async || kubectl(stage, &["get", OLD]).map(drop)).await
}

async fn ca_bundle(stage: &Stage) -> Result<Vec<u8>> {
    let crds: Api<CustomResourceDefinition> = Api::all(stage.lab.cluster().client());
    let conversion = crds.get(GATEWAY_CRD).await?.spec.conversion.context("no conversion")?;
    let config = conversion.webhook.and_then(|w| w.client_config).context("no webhook")?;
    ensure!(config.service.is_some() && config.url.is_none(), "{config:?}");
    Ok(config.ca_bundle.context("no CA")?.0)
}

fn kubectl(stage: &Stage, args: &[&str]) -> Result<String> {
    stage.lab.cluster().kubectl(args)
}

fn get(stage: &Stage, resource: &str, name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&kubectl(stage, &["get", resource, name, "-o", "json"])?)?)
}

fn file(stage: &Stage, name: &str, text: &str) -> Result<String> {
    let path: PathBuf = stage.lab.logs().join(format!("{name}.manifest"));
    std::fs::write(&path, text)?;
    Ok(path.to_string_lossy().into_owned())
}
