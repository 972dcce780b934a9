"""Ten short stories, written for this project: narrative text that no model was trained on and no package has to bring.

They stand beside `english` and `code`, which are technical, wherever a measure compares kinds of text.
"""

from __future__ import annotations

_TEXT = """
The ferry had already left when Ines came down the hill, so she sat on the wall and watched it grow small. Her brother
would be standing at the rail on the other side, looking for a red scarf, and she had left the red scarf on the
kitchen chair. A man with a bucket of mussels stopped beside her and asked whether she was waiting for the storm or
for the boat. For the boat, she said. Then you have chosen the wrong day, he answered, and sat down too. They shared
the bread that she had packed for the journey. By four the wind had turned and the harbour lamps were lit early. He
told her about a winter when the bay froze from shore to shore and his father walked across it with a pig on a sledge.
Nobody believed it afterwards, not even his father, who grew careful with the tale as he got older and finally said
that it had been a dog. When the second ferry came in, late and empty, she found that she was sorry to go. She gave
him the rest of the cheese. On the water the waves struck the hull like a hand on a table, and in the darkness ahead
someone was holding up a lantern and swinging it slowly from side to side.

***

Nobody in the orchestra liked the new conductor, who was young and never raised his voice. At the first rehearsal he
put down the baton after eight bars and asked the second oboe what she had eaten for breakfast. Porridge, she said,
too surprised to be offended. It sounds like porridge, he told her kindly, and they began again. Old Weiss at the back
said that he would not last until Easter. But he remembered all their names, and the names of their children, and
once, when the heating failed, he came with a basket of gloves from which he had cut the fingertips. In March the
soloist fell ill and there was no money for another. He turned to Weiss, who had played the concerto forty years
before, in a town that no longer carried the same name. Weiss said no. He said no again in the evening and a third
time on the telephone. On the night of the concert he stepped out in a suit that smelled of camphor, looked at the
full hall, and for a moment seemed to be listening to someone behind him. Then he lifted the bow. Afterwards the
second oboe swore that she had not breathed once during the slow movement, and nobody laughed at her.

***

My grandmother kept bees on the roof of a bakery, seven floors above the tramway. She carried the hives up herself,
one each spring, in the goods lift among the sacks of flour. The baker pretended not to know. In return there was a
jar on his counter every September with no label on it. I was nine when she let me hold the smoker. Walk as though you
were carrying soup, she said. The city looked different from up there, all chimneys and washing, and the bees went out
over it in a line as if somebody had ruled it with a pencil. She told me they had found a lime tree in the garden of
the courthouse, and that the judges had no idea how much was stolen from them daily. The summer she broke her hip I
climbed up alone. I talked to them as she had asked me to, about the weather and about the price of sugar, feeling
foolish, and then I told them that she was not coming back to the roof. They did not seem to mind. One of them walked
the whole length of my sleeve, stopped at the cuff, and flew off towards the courthouse. When I came down the baker
was standing in the yard with his cap in his hands.

***

The detective was tired of rich people's houses. In this one even the umbrella stand had a portrait. The stolen
necklace, said Mrs. Halloran, had belonged to a duchess who was unlucky in love. And where was it kept? In the
freezer, behind the peas. Nobody looks behind the peas. He wrote that down because it was true. The cook had been away
at a funeral, the nephew had been losing money at cards in front of nine witnesses, and the gardener had a bad knee
and could not have managed the stairs. Through the window he watched a magpie walk along the gutter with the air of an
inspector. People always hoped that it would be the magpie. He asked to see the freezer. The peas were there, and the
ice cream, and a drawer of fish wrapped in newspaper. The newspaper was from Tuesday. The funeral, he remembered, had
been on Wednesday. He closed the door gently, because he had liked the cook, who had given him a slice of plum cake
without being asked and had wanted to know about his daughter. Well, said Mrs. Halloran, have you found anything? Only
that you are out of butter, he said, and put the notebook away, and went to look for her in the garden.

***

When the river rose for the third time that year, the schoolteacher moved the school into the church, and when the
church began to leak she moved it into the cinema. The children sat in the velvet seats and did their sums on trays.
At noon the projectionist, who had nothing else to do, ran the only reel that had stayed dry, a film about camels. By
the end of the second week they knew it by heart and shouted the words before the actors could say them. Outside,
boats went up and down the main street, and a cow had been living on the roof of the pharmacy since Sunday. The mayor
came by with a megaphone to tell them that everything was under control. A boy asked him whether the camels would be
all right. The mayor looked at the teacher, and the teacher looked at the wall. They will walk all night, he said at
last, lowering the megaphone, and in the morning they will smell water. That is not how it goes, said the boy. But he
wrote it down, and years afterwards, when he made pictures of his own and people asked where he had learned it, he
told them about the mayor, standing there in rubber boots up to his hips.

***

There was a quarrel about the pear tree, and it was older than anybody who took part in it. The roots were on the
Brennan side and the branches on the Doyle side, and in good years the fruit lay in the lane where it belonged to no
one. One autumn young Doyle climbed up at night to shake the branches and met young Brennan, who had had the same idea
from the other direction. They stayed very still, each hoping to be taken for an owl. After a time she began to laugh.
He told her afterwards that it was the most frightening sound he had ever heard. They ate pears until it grew light
and threw the cores at the Doyles' weathercock. Of course it came out. Her uncle stopped speaking to his uncle, which
was hard to notice, since they had not spoken since the war. At the wedding the tables were set in the lane on
purpose, half on one side and half on the other, and there was perry from a barrel that had two names burned into the
lid. The tree came down in a gale the winter their second child was born. They found that it had been hollow for
years, and that both families had hidden money in it.

***

The astronaut's mother did not understand what he did, but she understood that it was cold. She knitted him a hat in
the colours of the football club and posted it to the agency with a letter asking them to see that he wore it. They
weighed it, because everything was weighed, and a woman in an office wrote back that it could not be allowed, on
account of the wool. The mother wrote again. She was a retired postmistress and she knew how to write to offices. In
the end it went up inside a bag of filters, and nobody could say afterwards who had put it there. He found it on the
eleventh day, when a pump had failed and they had been awake for thirty hours. His colleague, a serious man from the
north, took a photograph, and then held out his hand for it without a word, and wore it himself for a while, upside
down, with the bobble pointing at the Earth. From the window you could see the weather over the whole of the sea.
Somewhere under that cloud she would be feeding the hens. He said her name aloud, to try how it sounded up here, and
the other man nodded as though it had been a question.

***

On his last day at the factory they gave Tomas a clock, which he thought was tactless. He had spent thirty-one years
obeying one. He put it on the shelf above the sink, and it was four minutes fast by evening and nine by the end of the
week. He ought to have taken it back. Instead he began to get up by it. He was first at the baker's, first at the
swimming baths, first in the reading room, where the old men eyed him with suspicion. By Christmas the clock had
gained more than an hour. He went to bed when the neighbours sat down to eat, and saw the dawn from the bridge each
day with the milk lorries and the drunks. It was there that he met the woman who fed the swans. She asked why he was
always about so early. My clock is fast, he told her. Then you live a little in the future, she said, throwing a
crust. What is it like? He thought about it honestly, leaning on the cold rail. Quiet, he said. By the spring they had
both stopped looking at the time at all, and the clock, neglected, ran down one night at what it believed was noon.

***

It was the third summer without rain when the stranger walked into the village leading a mule, and on the mule was a
piano. Not a whole piano, he explained, drinking the water they brought him in a bowl: the legs had gone for firewood
in another valley. He set it on two barrels in the square. There were eleven keys that made no sound, and he stepped
around them when he played the way one steps around sleeping dogs. The priest said it would not bring rain. The
stranger agreed with him. He played in the evenings, when the stones gave back their heat, and people came out with
their chairs and pretended that they wanted the air. A girl called Lucha learned which keys were dumb and sang those
notes for him, so that the tunes came out whole. On the ninth night he was gone, and the mule, and the barrels stood
there with nothing on them. They waited for the rain to come then, because that is how it would be told. It did not
come until November. But all through that autumn you could hear her in the houses and at the dry wash-place, singing a
song with most of its notes left out.

***

The lighthouse keeper's assistant had been told three rules: never let the lamp go out, never count the steps aloud,
and never answer if somebody knocked. The first was the law, the second was habit, and the third nobody would explain.
He was nineteen and had expected loneliness, but the keeper talked from morning till night, mostly about cabbages. In
October the keeper rowed over for lamp oil and the fog came down behind him like a shutter. The young man trimmed the
wick and read the same page of the almanac. A little after two there was a knock. It was polite, such as a neighbour
gives who wants to borrow a cup of salt. He did not answer. It came again, lower down, as if whoever stood there had
sat on the step to wait. He thought of the law, and of cabbages. Then he took the lantern, went down all the stairs
without counting, and put his mouth to the crack of the door. We have no salt, he said. There was a silence. That is a
pity, replied the voice of the keeper, who had lost his key, his boat and one boot, and who never afterwards mentioned
the third rule to anyone.
"""


def stories() -> tuple[str, ...]:
    """The stories, about 230 words each, a paragraph without line breaks.

    >>> len(stories()), min(len(story.split()) for story in stories()) > 150
    (10, True)
    """
    return tuple(" ".join(story.split()) for story in _TEXT.split("***"))
