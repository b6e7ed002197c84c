use std::io::Write;

use super::*;
use crate::io::ImageSet;

/// A file as its specification has it.
fn idx(code: u8, sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, code, sizes.len() as u8];
    sizes.iter().for_each(|s| file.extend(s.to_be_bytes()));
    file.extend(data);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn error(path: &Path, bytes: &[u8]) -> String {
    std::fs::write(path, bytes).unwrap();
    ImageSet::open(path, [-1.0, 1.0]).unwrap_err().to_string()
}

#[test]
fn images_and_labels_are_those_of_the_files_packed_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let pixels: Vec<u8> = (0..3 * 2 * 4).map(|v| v * 10).collect();
    let images = idx(8, &[3, 2, 4], &pixels);
    let labels = idx(8, &[3], &[7, 0, 9]);
    let wanted = HostTensor::new(&[3, 1, 2, 4], &pixels).unwrap();
    for (packed, name, beside) in [
        (false, "train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        (true, "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"),
        (false, "val-images.idx3-ubyte", "val-labels.idx1-ubyte.gz"),
        (true, "images.idx.gz", "labels.idx.gz"),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, if packed { gzip(&images) } else { images.clone() }).unwrap();
        let open = || ImageSet::open(&path, [-1.0, 1.0]).unwrap();
        assert_eq!(open().labels(), None, "{name}");
        let bytes = if beside.ends_with(".gz") { gzip(&labels) } else { labels.clone() };
        std::fs::write(dir.path().join(beside), bytes).unwrap();
        let set = open();
        assert_eq!((set.len(), set.shape(), set.labels()), (3, [1, 2, 4], Some(&[7, 0, 9][..])), "{name}");
        assert_eq!(set.batch_u8(0, 3).unwrap(), wanted, "{name}");
    }
    // Two members of a gzip file are one stream.
    let path = dir.path().join("two.idx.gz");
    std::fs::write(&path, [gzip(&images[..20]), gzip(&images[20..])].concat()).unwrap();
    assert_eq!(ImageSet::open(&path, [-1.0, 1.0]).unwrap().batch_u8(0, 3).unwrap(), wanted);
    // Colours come last, as in every other array of bytes.
    let path = dir.path().join("colour.idx");
    std::fs::write(&path, idx(8, &[1, 1, 2, 3], &[1, 2, 3, 4, 5, 6])).unwrap();
    let set = ImageSet::open(&path, [-1.0, 1.0]).unwrap();
    assert_eq!((set.shape(), &set.batch_u8(0, 1).unwrap().bytes()[..]), ([3, 1, 2], &[1, 4, 2, 5, 3, 6][..]));
}

#[test]
fn values_of_more_than_a_byte_are_big_endian_and_floats_have_the_range() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.idx");
    let floats: Vec<u8> = [0.0f32, 1.0, 0.2, 0.6].iter().flat_map(|v| v.to_be_bytes()).collect();
    std::fs::write(&path, gzip(&idx(0x0d, &[1, 2, 2], &floats))).unwrap();
    let set = ImageSet::open(&path, [0.0, 1.0]).unwrap();
    assert_eq!(&set.batch_u8(0, 1).unwrap().bytes()[..], [0, 255, 51, 153]);
    let integers: Vec<u8> = [-2i32, 70_000].iter().flat_map(|v| v.to_be_bytes()).collect();
    std::fs::write(&path, idx(0x0c, &[2], &integers)).unwrap();
    assert_eq!(read(&path).unwrap().to_i64(), [-2, 70_000]);
    assert!(error(&path, &idx(0x0c, &[1, 1, 1], &[0; 4])).contains("images of i32, expected u8 or float"));
}

#[test]
fn headers_that_lie_and_files_that_are_cut_say_so_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.idx");
    let whole = idx(8, &[2, 2, 2], &[1; 8]);
    let huge = idx(8, &[u32::MAX, 28, 28], &[0; 5]);
    let cases = [
        (whole[..15].to_vec(), "too short for its header"),
        (whole[..20].to_vec(), "4 bytes of data where the header's sizes [2, 2, 2] need 8 bytes"),
        ([&whole[..], &[0]].concat(), "9 bytes of data where"),
        (idx(7, &[2, 2, 2], &[1; 8]), "element type 0x07, expected 0x08"),
        (idx(8, &[], &[]), "0 dimensions, expected 1 to 8"),
        (idx(8, &[1; 9], &[1]), "9 dimensions"),
        (idx(0x0e, &[u32::MAX; 8], &[1]), "[4294967295, "),
        (huge.clone(), "5 bytes of data where the header's sizes [4294967295, 28, 28] need 3367254359280 bytes"),
        (idx(8, &[0, 2, 2], &[]), "holds no images"),
        (b"\x89PNG\r\n\x1a\n".to_vec(), "begins with 0x89 0x50, expected two zero bytes"),
        (gzip(&whole[..15]), "too short for its header"),
        (gzip(&whole[..20]), "4 bytes of data where"),
        (gzip(&[&whole[..], &[0]].concat()), "more than 8 bytes of data where"),
        (gzip(&huge), "packed bytes, which hold at most"),
        (gzip(b"text"), "not an IDX file"),
    ];
    for (bytes, says) in cases {
        let e = error(&path, &bytes);
        assert!(e.contains(says) && e.contains("a.idx"), "{says}: {e}");
    }
    // A stream that is cut, one whose checksum is wrong, and one that something follows.
    let packed = gzip(&whole);
    let mut wrong = packed.clone();
    let at = wrong.len() - 6;
    wrong[at] ^= 1;
    for bytes in [packed[..packed.len() - 12].to_vec(), wrong, [&packed[..], b"more"].concat()] {
        let e = error(&path, &bytes);
        assert!(e.contains("gzip stream is cut short or damaged"), "{e}");
    }
}

#[test]
fn labels_that_do_not_belong_to_the_images_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train-images-idx3-ubyte");
    let labels = dir.path().join("train-labels-idx1-ubyte");
    let images = idx(8, &[2, 1, 1], &[1, 2]);
    std::fs::write(&labels, idx(8, &[3], &[1, 2, 3])).unwrap();
    let e = error(&path, &images);
    assert!(e.contains("u8 [3], expected 2 integers") && e.contains("train-labels-idx1-ubyte"), "{e}");
    std::fs::write(&labels, idx(9, &[2], &[1, 255])).unwrap();
    assert!(error(&path, &images).contains("the label -1, expected a class number"));
    // Another file of the same folder has none.
    std::fs::write(dir.path().join("other-ubyte"), &images).unwrap();
    assert_eq!(ImageSet::open(&dir.path().join("other-ubyte"), [-1.0, 1.0]).unwrap().labels(), None);
}
