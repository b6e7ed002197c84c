use super::*;

#[test]
fn zips_and_sub_folders_hold_labelled_images() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let image = |v: u8| encode_png(&[v; 4], [1, 2, 2]).unwrap();
    let folder = dir.path().join("folder");
    for (class, k) in [("cat", 0), ("cat", 1), ("dog", 2)] {
        std::fs::create_dir_all(folder.join(class)).unwrap();
        std::fs::write(folder.join(format!("{class}/{k}.png")), image(k)).unwrap();
    }
    let set = ImageSet::open(&folder, [-1.0, 1.0]).unwrap();
    assert_eq!((set.len(), set.labels()), (3, Some(&[0, 0, 1][..])));
    // EDM's dataset format.
    let path = dir.path().join("edm.zip");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    for k in 0..3u8 {
        zip.start_file(format!("00000/img{k}.png"), Default::default()).unwrap();
        zip.write_all(&image(k)).unwrap();
    }
    zip.start_file("dataset.json", Default::default()).unwrap();
    zip.write_all(br#"{"labels": [["00000/img2.png", 7], ["00000/img0.png", 3], ["00000/img1.png", 0]]}"#).unwrap();
    zip.finish().unwrap();
    let zipped = ImageSet::open(&path, [-1.0, 1.0]).unwrap();
    assert_eq!(zipped.labels(), Some(&[3, 0, 7][..]));
    assert_eq!(zipped.batch_u8(1, 2).unwrap(), set.batch_u8(1, 2).unwrap());
    assert_eq!(zipped.gather_u8(&[2, 0]).unwrap(), set.gather_u8(&[2, 0]).unwrap());
    // ADM's batches: arr_0 and arr_1, the second integers.
    let path = dir.path().join("adm.npz");
    let images = HostTensor::new(&[2, 2, 2, 3], &[9u8; 24]).unwrap();
    npy::write_npz(&path, &[("arr_0", &images), ("arr_1", &HostTensor::vec(&[5i64, 6]))]).unwrap();
    let set = ImageSet::open(&path, [-1.0, 1.0]).unwrap();
    assert_eq!((set.shape(), set.labels()), ([3, 2, 2], Some(&[5, 6][..])));
    std::fs::write(&path, b"no zip").unwrap();
    assert!(ImageSet::open(&path, [-1.0, 1.0]).unwrap_err().to_string().contains("adm.npz: not a"));
    std::fs::create_dir_all(dir.path().join("jpeg")).unwrap();
    std::fs::write(dir.path().join("jpeg/a.JPG"), b"x").unwrap();
    let error = ImageSet::open(&dir.path().join("jpeg"), [-1.0, 1.0]).unwrap_err().to_string();
    assert!(error.contains("a.JPG: not a JPEG file") || error.contains("1 JPEG (this build"), "{error}");
}

#[test]
fn folder_and_arrays_hold_the_same_images() {
    let dir = tempfile::tempdir().unwrap();
    let pixels: Vec<u8> = (0..2 * 3 * 4 * 5).map(|v| v as u8).collect();
    for k in 0..2 {
        let png = encode_png(&pixels[k * 60..k * 60 + 60], [3, 4, 5]).unwrap();
        std::fs::write(dir.path().join(format!("{k}.png")), png).unwrap();
    }
    let folder = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
    assert_eq!((folder.len(), folder.shape()), (2, [3, 4, 5]));
    let first = HostTensor::new(&[2, 3, 4, 5], &pixels).unwrap();
    assert_eq!(folder.batch_u8(0, 2).unwrap(), first);
    // The float form of an 8-bit image comes back as the same image.
    let floats: Vec<f32> = pixels.iter().map(|&v| (f32::from(v) - 127.5) / 127.5).collect();
    let set = ImageSet::from_tensor(HostTensor::new(&[2, 3, 4, 5], &floats).unwrap(), [-1.0, 1.0]).unwrap();
    assert_eq!(set.batch_u8(0, 2).unwrap(), first);
    // Channels last.
    let mut last = vec![];
    for k in 0..2 {
        for p in 0..20 {
            last.extend((0..3).map(|c| pixels[k * 60 + c * 20 + p]));
        }
    }
    let set = ImageSet::from_tensor(HostTensor::new(&[2, 4, 5, 3], &last).unwrap(), [-1.0, 1.0]).unwrap();
    assert_eq!(set.batch_u8(1, 1).unwrap(), first.rows(1, 1).unwrap());
    assert_eq!(set.batch(0, 1).unwrap().to_f32()[3], 3.0 / 127.5 - 1.0);
}

/// What macOS, Windows and people leave in folders and archives.
#[test]
fn clutter_is_passed_over_and_other_files_are_counted() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let image = |v: u8| encode_png(&[v; 4], [1, 2, 2]).unwrap();
    let folder = dir.path().join("set");
    for place in ["", "__MACOSX", ".ipynb_checkpoints"] {
        std::fs::create_dir_all(folder.join(place)).unwrap();
    }
    let clutter =
        ["._a.png", "Thumbs.db", ".DS_Store", "__MACOSX/._a.png", "__MACOSX/z.png", ".ipynb_checkpoints/a.png"];
    for name in clutter {
        std::fs::write(folder.join(name), b"no image").unwrap();
    }
    std::fs::write(folder.join("a.png"), image(1)).unwrap();
    std::fs::write(folder.join("b.png"), image(2)).unwrap();
    let read = |path: &Path| ImageSet::open(path, [-1.0, 1.0]).unwrap();
    assert!(read(&folder).notes().is_empty(), "{:?}", read(&folder).notes());
    std::fs::write(folder.join("c.gif"), b"GIF").unwrap();
    std::fs::write(folder.join("notes.TXT"), b"x").unwrap();
    std::fs::write(folder.join("dataset.json"), b"\xef\xbb\xbf{\"labels\": [[\"b.png\", 1], [\"a.png\", 4]]}").unwrap();
    let set = read(&folder);
    assert_eq!((set.len(), set.labels()), (2, Some(&[4, 1][..])));
    assert_eq!(set.notes(), ["4 files, 2 of them images (2 PNG), 2 passed over: 1 .gif, 1 .txt"]);
    let path = dir.path().join("mac.zip");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    for (name, bytes) in [("a.png", image(1)), ("__MACOSX/._a.png", vec![0]), ("b.png", image(2)), ("readme", vec![0])]
    {
        zip.start_file(name, Default::default()).unwrap();
        zip.write_all(&bytes).unwrap();
    }
    zip.finish().unwrap();
    assert_eq!(read(&path).batch_u8(0, 2).unwrap(), set.batch_u8(0, 2).unwrap());
    assert!(read(&path).notes()[0].contains("1 passed over: 1 without an extension"));
    #[cfg(unix)]
    {
        let linked = dir.path().join("linked");
        std::fs::create_dir_all(linked.join("y")).unwrap();
        std::os::unix::fs::symlink(&folder, linked.join("x")).unwrap();
        std::os::unix::fs::symlink(&linked, linked.join("round")).unwrap();
        std::os::unix::fs::symlink("nowhere", linked.join("gone.png")).unwrap();
        std::fs::write(linked.join("y/c.png"), image(3)).unwrap();
        let set = read(&linked);
        assert_eq!((set.len(), set.labels()), (3, Some(&[0, 0, 1][..])));
        let notes = set.notes().join("; ");
        assert!(notes.contains("1 broken link") && notes.contains("1 link to a folder above it"), "{notes}");
    }
}

/// An archive of one member of many zeros behind `head`, that says of itself that it unpacks to `says` bytes.
fn bomb(path: &Path, name: &str, head: &[u8], says: Option<u32>) {
    use std::io::Write;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file(name, zip::write::FileOptions::default()).unwrap();
    zip.write_all(head).unwrap();
    let zeros = vec![0; 1 << 20];
    (0..80).for_each(|_| zip.write_all(&zeros).unwrap());
    let mut bytes = zip.finish().unwrap().into_inner();
    for (mark, at) in [(b"PK\x03\x04", 22), (b"PK\x01\x02", 24)] {
        let start = bytes.windows(4).position(|w| w == mark).unwrap() + at;
        if let Some(says) = says {
            bytes[start..start + 4].copy_from_slice(&says.to_le_bytes());
        }
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn archives_unpack_no_further_than_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.zip");
    let error = |path: &Path| ImageSet::open(path, [-1.0, 1.0]).unwrap_err().to_string();
    let png = encode_png(&[1; 64], [1, 8, 8]).unwrap();
    bomb(&path, "a.png", &png, None);
    let e = error(&path);
    assert!(e.contains("by what the archive says; a PNG file of 8x8 has at most"), "{e}");
    bomb(&path, "a.png", &png, Some(1 << 17));
    let e = error(&path);
    assert!(e.contains("a.png: more bytes than the 131072 that the archive says"), "{e}");
    bomb(&path, "a.png", b"", None);
    assert!(error(&path).contains("whose size does not stand at its beginning"));
    // Header and archive must agree on an array's size.
    let path = dir.path().join("b.npz");
    let mut head = Vec::new();
    npy::write_to(&mut head, &HostTensor::new(&[0, 1, 8, 8], &[0u8; 0]).unwrap()).unwrap();
    let text =
        String::from_utf8_lossy(&head[10..]).replace("(0, 1, 8, 8,)", "(1280000,1,8,8,)").replacen("   \n", "\n", 1);
    head.truncate(10);
    head.extend(text.as_bytes());
    assert_eq!(head.len() % 64, 0);
    bomb(&path, "images.npy", &head, Some(100));
    let e = error(&path);
    assert!(e.contains("bytes of data where the shape [1280000, 1, 8, 8] needs 81920000"), "{e}");
    bomb(&path, "images.npy", &head, None);
    assert_eq!(ImageSet::open(&path, [-1.0, 1.0]).unwrap().len(), 1_280_000);
}

#[cfg(unix)]
#[test]
fn pipes_among_the_images_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = std::ffi::CString::new(dir.path().join("0.png").to_str().unwrap()).unwrap();
    // SAFETY: a C string that lives as long as the call.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    std::fs::write(dir.path().join("1.png"), encode_png(&[1; 4], [1, 2, 2]).unwrap()).unwrap();
    let set = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
    assert!(set.len() == 1 && set.notes()[0].contains("1 pipe, socket or device"), "{:?}", set.notes());
}

#[cfg(feature = "formats")]
#[test]
fn other_formats_are_read_and_turned_as_they_say() {
    let dir = tempfile::tempdir().unwrap();
    // 6 x 4, smooth, so that JPEG keeps it.
    let pixels: Vec<u8> = (0..24).flat_map(|k| [(k * 9) as u8, 100, (200 - k * 5) as u8]).collect();
    let buffer = image::RgbImage::from_raw(6, 4, pixels.clone()).unwrap();
    for name in ["a.png", "b.BMP", "c.tif", "d.webp"] {
        let format = image::ImageFormat::from_path(name).unwrap();
        buffer.save_with_format(dir.path().join(name), format).unwrap();
    }
    let jpeg = dir.path().join("e.jpeg");
    let mut bytes = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 100)
        .encode(&pixels, 6, 4, image::ExtendedColorType::Rgb8)
        .unwrap();
    std::fs::write(&jpeg, &bytes).unwrap();
    let set = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
    assert_eq!((set.len(), set.shape()), (5, [3, 4, 6]));
    let first = set.batch_u8(0, 1).unwrap();
    for k in 1..4 {
        assert_eq!(set.batch_u8(k, 1).unwrap(), first, "{k}");
    }
    let lossy = set.batch_u8(4, 1).unwrap();
    let worst = lossy.bytes().iter().zip(first.bytes()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!((1..12).contains(&worst), "{worst}");
    assert!(set.notes()[0].starts_with("2 of 5 images are JPEG or WebP"), "{:?}", set.notes());
    // EXIF orientation 6: a quarter turn to the right.
    let exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut turned = bytes[..2].to_vec();
    turned.extend([0xff, 0xe1, 0, exif.len() as u8 + 2]);
    turned.extend(exif);
    turned.extend(&bytes[2..]);
    std::fs::create_dir(dir.path().join("turned")).unwrap();
    std::fs::write(dir.path().join("turned/a.jpg"), turned).unwrap();
    let set = ImageSet::open(&dir.path().join("turned"), [-1.0, 1.0]).unwrap();
    assert_eq!(set.shape(), [3, 6, 4]);
    let got = set.batch_u8(0, 1).unwrap();
    for (y, x) in (0..6).flat_map(|y| (0..4).map(move |x| (y, x))) {
        assert_eq!(got.bytes()[y * 4 + x], lossy.bytes()[(3 - x) * 6 + y], "{y} {x}");
    }
}

#[test]
fn bad_sets_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = |path: &Path| ImageSet::open(path, [-1.0, 1.0]).unwrap_err().to_string();
    assert!(error(dir.path()).contains("no .png files"));
    assert!(error(Path::new("/nowhere")).contains("/nowhere: no such"));
    std::fs::write(dir.path().join("a.png"), b"no picture").unwrap();
    assert!(error(dir.path()).contains("a.png: not a PNG file"));
    std::fs::write(dir.path().join("a.png"), encode_png(&[0; 12], [3, 2, 2]).unwrap()).unwrap();
    std::fs::write(dir.path().join("b.png"), encode_png(&[0; 4], [1, 2, 2]).unwrap()).unwrap();
    let set = ImageSet::open(dir.path(), [-1.0, 1.0]).unwrap();
    let mixed = set.batch_u8(0, 2).unwrap_err().to_string();
    assert!(mixed.contains("b.png: 2x2, grey where the first image of the set is 2x2, colour"), "{mixed}");
    let nan = HostTensor::new(&[2, 1, 1], &[0.0, f32::NAN]).unwrap();
    let set = ImageSet::from_tensor(nan, [-1.0, 1.0]).unwrap();
    assert!(set.batch(0, 2).unwrap_err().to_string().contains("image 1 holds NaN"));
    let labels = HostTensor::vec(&[1i64, 2]);
    assert!(ImageSet::from_tensor(labels, [-1.0, 1.0]).is_err());
}
